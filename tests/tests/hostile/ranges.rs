//! Requests for what the disk does not have or does not do, and what the
//! device must say about how much it wrote.

use pericarp_tests::conformance::{Case, DISK, Outcome, SCRATCH_SECTOR, SERIAL, content};
use pericarp_tests::frontend::{Chain, DATA, Driver, HEADER, Op, STATUS};
use pericarp_tests::model::SECTOR;
use pericarp_tests::peer::Kind::QemuStorageDaemon as Qemu;

use crate::{IOERR, OK, UNSUPP, answered, must};

const SECTORS: u64 = DISK / SECTOR;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("sectors near the top of u64", near_the_top),
        Case::new("one sector past the end", past_the_end),
        Case::new("lengths that are no sectors", odd_lengths),
        Case::new("unknown request types", unknown_types),
        Case::new(
            "discard and write zeroes that were not offered",
            not_offered,
        )
        .differs(Qemu, "does them whether agreed on or not"),
        Case::new("used lengths", used_lengths),
        Case::new("serial number", serial).differs(Qemu, "7.2 has a fixed one"),
        Case::new("serial number into a short buffer", short_serial)
            .differs(Qemu, "7.2 has a fixed one"),
        Case::new("flush of a sector", flush_of_a_sector),
    ]
}

pub(crate) fn read_only() -> Vec<Case> {
    vec![
        Case::new("write to a read-only disk", write_read_only),
        Case::new("flush of a read-only disk", |d| {
            must(d.request(0, &Op::Flush)?.status == OK, "a flush failed")
        }),
    ]
}

fn near_the_top(d: &mut Driver) -> Outcome {
    let top = u64::MAX / SECTOR;
    for sector in [
        u64::MAX,
        u64::MAX - 1,
        top,
        top + 1,
        top - 1,
        1 << 55,
        1 << 63,
    ] {
        for op in [
            Op::Read { sector, len: 512 },
            Op::Write {
                sector,
                data: vec![7; 1024],
            },
        ] {
            let status = d.request(0, &op)?.status;
            must(
                status == IOERR,
                &format!("sector {sector:#x}: status {status}"),
            )?;
        }
    }
    Ok(())
}

fn past_the_end(d: &mut Driver) -> Outcome {
    for (sector, len) in [(SECTORS, 512), (SECTORS - 1, 1024), (SECTORS - 127, 65536)] {
        let data = vec![7; len as usize];
        for op in [Op::Read { sector, len }, Op::Write { sector, data }] {
            let status = d.request(0, &op)?.status;
            must(
                status == IOERR,
                &format!("{len} bytes at {sector}: status {status}"),
            )?;
        }
    }
    let last = d.request(
        0,
        &Op::Read {
            sector: SECTORS - 1,
            len: 512,
        },
    )?;
    must(
        last.data == content().read(DISK - 512, 512),
        "a part was written",
    )
}

fn odd_lengths(d: &mut Driver) -> Outcome {
    for len in [1, 511, 513, 4095, 65535] {
        let data = vec![7; len as usize];
        for op in [Op::Read { sector: 0, len }, Op::Write { sector: 0, data }] {
            let status = d.request(0, &op)?.status;
            must(status == IOERR, &format!("{len} bytes: status {status}"))?;
        }
    }
    Ok(())
}

fn unknown_types(d: &mut Driver) -> Outcome {
    // The top bit was a barrier flag before virtio 1.0, which peers still mask.
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 99, 0x7fff_ffff] {
        let status = d
            .request(
                0,
                &Op::Other {
                    kind,
                    sector: 0,
                    room: 512,
                },
            )?
            .status;
        must(status == UNSUPP, &format!("type {kind}: status {status}"))?;
    }
    Ok(())
}

fn not_offered(d: &mut Driver) -> Outcome {
    for kind in [11, 13] {
        d.head(0, kind, 0)?;
        // One segment: sector 0, eight sectors, no flags.
        d.poke(
            DATA(0),
            &[[0, 0, 0, 0, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0, 0]].concat(),
        )?;
        let chain = Chain::new()
            .read(HEADER(0), 16)
            .read(DATA(0), 16)
            .write(STATUS(0), 1);
        answered(d, &chain, &[UNSUPP])?;
    }
    Ok(())
}

fn used_lengths(d: &mut Driver) -> Outcome {
    let ops = [
        (
            Op::Read {
                sector: 0,
                len: 4096,
            },
            4097,
        ),
        (
            Op::Write {
                sector: SCRATCH_SECTOR,
                data: vec![1; 4096],
            },
            1,
        ),
        (Op::Flush, 1),
    ];
    for (op, want) in ops {
        let answer = d.request(0, &op)?;
        must(answer.status == OK, "a good request failed")?;
        must(
            answer.used == want,
            &format!("{op:?}: used length {}", answer.used),
        )?;
    }
    Ok(())
}

fn serial(d: &mut Driver) -> Outcome {
    let answer = d.request(0, &Op::GetId { len: 20 })?;
    must(answer.status == OK, "GET_ID failed")?;
    let mut want = SERIAL.as_bytes().to_vec();
    want.resize(20, 0);
    must(
        answer.data == want,
        &format!("{:?}", String::from_utf8_lossy(&answer.data)),
    )?;
    must(answer.used == 21, &format!("used length {}", answer.used))
}

fn short_serial(d: &mut Driver) -> Outcome {
    d.poke(DATA(0), &[0xaa; 32])?;
    let answer = d.request(0, &Op::GetId { len: 8 })?;
    let right = answer.status == IOERR || answer.data == SERIAL.as_bytes()[..8];
    must(
        right,
        &format!("status {}, {:?}", answer.status, answer.data),
    )?;
    must(
        d.peek(DATA(0) + 8, 24)? == [0xaa; 24],
        "wrote past the buffer",
    )
}

fn flush_of_a_sector(d: &mut Driver) -> Outcome {
    let status = d
        .request(
            0,
            &Op::Other {
                kind: 4,
                sector: u64::MAX,
                room: 0,
            },
        )?
        .status;
    // A driver must send zero here; a device need not look.
    must(status == OK || status == IOERR, &format!("status {status}"))
}

fn write_read_only(d: &mut Driver) -> Outcome {
    for len in [512, 4096] {
        d.poke(STATUS(0) + 1, &[0xaa; 8])?;
        let answer = d.request(
            0,
            &Op::Write {
                sector: 0,
                data: vec![7; len],
            },
        )?;
        must(answer.status == IOERR, &format!("status {}", answer.status))?;
        must(answer.used == 1, &format!("used length {}", answer.used))?;
        must(
            d.peek(STATUS(0) + 1, 8)? == [0xaa; 8],
            "more than one status byte was written",
        )?;
    }
    Ok(())
}
