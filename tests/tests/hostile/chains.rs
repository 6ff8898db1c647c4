//! Chains of every shape: legal but unusual ones must work, broken ones must
//! be completed and signalled, with an error where there is a status byte.

use pericarp_tests::conformance::{Case, Outcome, SCRATCH_SECTOR, content};
use pericarp_tests::frontend::{
    ADJACENT, Chain, DATA, Desc, Driver, FAR, HEADER, INDIRECT, NEXT, Op, REGION, STATUS, TABLE,
    WRITE,
};
use pericarp_tests::model::Sequence;
use pericarp_tests::peer::Kind::{QemuStorageDaemon as Qemu, Reference};

use crate::{IOERR, OK, answered, judged, must};

/// libvhost-user calls the device broken on the first chain it dislikes and
/// processes no ring until the front end comes back.
const GIVES_UP: &str = "libvhost-user stops serving the connection";
/// So the last descriptor, the status, is never seen.
const CUT_SHORT: &str = "virtio-queue ends a chain where it grows beyond 4 GiB";

const READ: u32 = 0;
const WRITE_OUT: u32 = 1;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("read without data", |d| no_data(d, READ)),
        Case::new("write without data", |d| no_data(d, WRITE_OUT)),
        Case::new("header in two descriptors", |d| split_header(d, 8)),
        Case::new("header in sixteen descriptors", |d| split_header(d, 1)),
        Case::new("header and data in one descriptor", header_with_data),
        Case::new("data and status in one descriptor", data_with_status),
        Case::new("data in 60 segments", many_segments),
        Case::new("data in segments that are no sectors", odd_segments),
        Case::new("status descriptor of four bytes", wide_status),
        Case::new("writable before readable", wrong_order).differs(Qemu, GIVES_UP),
        Case::new("zero-length segment", zero_segment).differs(Qemu, GIVES_UP),
        Case::new("descriptor that is its own successor", |d| looped(d, 1)).differs(Qemu, GIVES_UP),
        Case::new("loop of two descriptors", |d| looped(d, 2)).differs(Qemu, GIVES_UP),
        Case::new("loop through the whole ring", |d| looped(d, 128)).differs(Qemu, GIVES_UP),
        Case::new("successor beyond the ring", |d| successor(d, 128)).differs(Qemu, GIVES_UP),
        Case::new("successor 65535", |d| successor(d, 0xffff)).differs(Qemu, GIVES_UP),
        Case::new("head beyond the ring", |d| bad_head(d, 128)).reconnect(),
        Case::new("head 65535", |d| bad_head(d, 0xffff)).reconnect(),
        Case::new("indirect", indirect),
        Case::new("indirect after a direct descriptor", indirect_tail).differs(
            Qemu,
            "libvhost-user looks for a table in the first descriptor only",
        ),
        Case::new("indirect longer than the ring", indirect_long).with(|s| s.queue_size = 16),
        Case::new("indirect in indirect", nested).differs(Qemu, GIVES_UP),
        Case::new("indirect length not a multiple of 16", |d| table_len(d, 40))
            .differs(Qemu, GIVES_UP),
        Case::new("indirect length zero", |d| table_len(d, 0)).differs(Qemu, GIVES_UP),
        Case::new("indirect table of 4 GiB", |d| table_len(d, 0xffff_fff0)).differs(Qemu, GIVES_UP),
        Case::new("indirect table in a hole", |d| table_at(d, FAR - 4096)).differs(Qemu, GIVES_UP),
        Case::new("indirect table at the top", |d| table_at(d, u64::MAX - 15))
            .differs(Qemu, GIVES_UP),
        Case::new("indirect table across two regions", table_across).differs(Qemu, GIVES_UP),
        Case::new("indirect with a successor", indirect_next),
        Case::new("loop in an indirect table", indirect_loop).differs(Qemu, GIVES_UP),
        Case::new("indirect although not agreed on", indirect_loop)
            .with(|s| s.indirect = false)
            .differs(Qemu, GIVES_UP),
        Case::new("more than 4 GiB in one chain", |d| giant(d, 0xffff_ffff))
            .differs(Qemu, GIVES_UP)
            .differs(Reference, CUT_SHORT),
        Case::new("2 GiB in one chain", |d| giant(d, REGION as u32)),
        Case::new("data across two regions", across),
        Case::new("data across the end of memory", |d| {
            outside(d, 2 * REGION - 256)
        })
        .differs(Qemu, GIVES_UP),
        Case::new("data in a hole", |d| outside(d, FAR - 8192)).differs(Qemu, GIVES_UP),
        Case::new("data at the top of the address space", |d| {
            outside(d, u64::MAX - 511)
        })
        .differs(Qemu, GIVES_UP),
        Case::new("data that wraps around", |d| outside(d, u64::MAX - 255)).differs(Qemu, GIVES_UP),
        Case::new("header in a hole", header_outside).differs(Qemu, GIVES_UP),
        Case::new("status in a hole", status_outside).differs(Qemu, GIVES_UP),
        Case::new("header of eight bytes", short_header).differs(Qemu, GIVES_UP),
        Case::new("no header", no_header).differs(Qemu, GIVES_UP),
        Case::new("no status", no_status).differs(Qemu, GIVES_UP),
        Case::new("status of length zero", empty_status).differs(Qemu, GIVES_UP),
        Case::new("one empty descriptor", empty).differs(Qemu, GIVES_UP),
        Case::new("available index jumps", |d| jump(d, 129)).reconnect(),
        Case::new("available index jumps far", |d| jump(d, 0x8000)).reconnect(),
        Case::new("available index goes back", |d| jump(d, 0xffff)).reconnect(),
        Case::new("same head twice", twice).reconnect(),
        Case::new("descriptors overwritten in flight", overwritten).reconnect(),
    ]
}

/// Plays a read of sector 0 whose data is checked when it succeeds.
fn reads_right(d: &mut Driver, chain: &Chain, data_at: u64, len: usize, allowed: &[u8]) -> Outcome {
    if answered(d, chain, allowed)? == OK {
        let data = d.peek(data_at, len)?;
        must(
            data == content().read(0, len),
            "the read says OK with wrong data",
        )?;
    }
    Ok(())
}

fn no_data(d: &mut Driver, kind: u32) -> Outcome {
    d.head(0, kind, 0)?;
    let chain = Chain::new().read(HEADER(0), 16).write(STATUS(0), 1);
    answered(d, &chain, &[OK, IOERR]).map(drop)
}

fn split_header(d: &mut Driver, part: u32) -> Outcome {
    d.head(0, READ, 0)?;
    let mut chain = Chain::new();
    for at in (0..16).step_by(part as usize) {
        chain = chain.read(HEADER(0) + at, part);
    }
    let chain = chain.write(DATA(0), 1024).write(STATUS(0), 1);
    reads_right(d, &chain, DATA(0), 1024, &[OK])
}

fn header_with_data(d: &mut Driver) -> Outcome {
    let data = Sequence::new(5).bytes(1024);
    d.head(0, WRITE_OUT, SCRATCH_SECTOR)?;
    let header = d.peek(HEADER(0), 16)?;
    d.poke(DATA(0), &[header, data.clone()].concat())?;
    let chain = Chain::new().read(DATA(0), 16 + 1024).write(STATUS(0), 1);
    answered(d, &chain, &[OK])?;
    let back = d.request(
        0,
        &Op::Read {
            sector: SCRATCH_SECTOR,
            len: 1024,
        },
    )?;
    must(
        back.data == data,
        "the write says OK but wrote something else",
    )
}

fn data_with_status(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    d.poke(DATA(0) + 512, &[0xee])?;
    d.play(0, &Chain::new().read(HEADER(0), 16).write(DATA(0), 513))?;
    judged(d, DATA(0) + 512, &[OK])?;
    must(
        d.peek(DATA(0), 512)? == content().read(0, 512),
        "wrong data",
    )
}

fn many_segments(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    let mut chain = Chain::new().read(HEADER(0), 16);
    for i in 0..60 {
        chain = chain.write(DATA(0) + i * 512, 512);
    }
    reads_right(d, &chain.write(STATUS(0), 1), DATA(0), 60 * 512, &[OK])
}

fn odd_segments(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    let mut chain = Chain::new().read(HEADER(0), 16);
    let mut at = 0;
    for len in [1, 511, 3952, 2704, 1000, 24] {
        chain = chain.write(DATA(0) + at, len);
        at += u64::from(len);
    }
    reads_right(d, &chain.write(STATUS(0), 1), DATA(0), at as usize, &[OK])
}

fn wide_status(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    d.poke(STATUS(0), &[0xee; 4])?;
    d.play(
        0,
        &Chain::new()
            .read(HEADER(0), 16)
            .write(DATA(0), 512)
            .write(STATUS(0), 4),
    )?;
    // The status is the last byte the device may write, so 515 bytes are data.
    judged(d, STATUS(0) + 3, &[IOERR]).map(drop)
}

fn wrong_order(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    let chain = Chain::new()
        .write(DATA(0), 512)
        .read(HEADER(0), 16)
        .write(STATUS(0), 1);
    answered(d, &chain, &[IOERR]).map(drop)
}

fn zero_segment(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    let chain = Chain::new().read(HEADER(0), 16).write(DATA(0), 512);
    let chain = chain
        .write(DATA(1), 0)
        .write(DATA(0) + 512, 512)
        .write(STATUS(0), 1);
    reads_right(d, &chain, DATA(0), 1024, &[OK, IOERR])
}

fn looped(d: &mut Driver, count: u16) -> Outcome {
    d.head(0, READ, 0)?;
    for i in 0..count {
        let next = (i + 1) % count;
        d.rings[0].set_desc(
            i,
            Desc {
                addr: HEADER(0),
                len: 16,
                flags: NEXT,
                next,
            },
        );
    }
    d.offer(0, 0);
    d.settled(0, 0)?;
    Ok(())
}

fn successor(d: &mut Driver, next: u16) -> Outcome {
    d.head(0, READ, 0)?;
    d.rings[0].set_desc(
        0,
        Desc {
            addr: HEADER(0),
            len: 16,
            flags: NEXT,
            next,
        },
    );
    d.offer(0, 0);
    d.settled(0, 0)?;
    Ok(())
}

fn bad_head(d: &mut Driver, head: u16) -> Outcome {
    // There is no descriptor to give back; nothing can be asked of this ring.
    d.offer(0, head);
    let limit = std::time::Duration::from_millis(50);
    let _ = d.rings[0].watch(1, limit);
    Ok(())
}

fn indirect(d: &mut Driver) -> Outcome {
    let chain = d.prepare(
        0,
        &Op::Read {
            sector: 0,
            len: 4096,
        },
    )?;
    d.place_indirect(0, 9, 0, &chain)?;
    d.offer(0, 9);
    d.settled(0, 9)?;
    judged(d, STATUS(0), &[OK])?;
    must(
        d.peek(DATA(0), 4096)? == content().read(0, 4096),
        "wrong data",
    )
}

fn indirect_tail(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    d.rings[0].set_desc(
        0,
        Desc {
            addr: HEADER(0),
            len: 16,
            flags: NEXT,
            next: 1,
        },
    );
    d.place_indirect(
        0,
        1,
        0,
        &Chain::new().write(DATA(0), 512).write(STATUS(0), 1),
    )?;
    d.offer(0, 0);
    d.settled(0, 0)?;
    judged(d, STATUS(0), &[OK, IOERR]).map(drop)
}

fn indirect_long(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    let mut chain = Chain::new().read(HEADER(0), 16);
    for i in 0..100 {
        chain = chain.write(DATA(0) + i * 512, 512);
    }
    d.place_indirect(0, 0, 0, &chain.write(STATUS(0), 1))?;
    d.offer(0, 0);
    d.settled(0, 0)?;
    if judged(d, STATUS(0), &[OK, IOERR])? == OK {
        must(
            d.peek(DATA(0), 51200)? == content().read(0, 51200),
            "wrong data",
        )?;
    }
    Ok(())
}

fn nested(d: &mut Driver) -> Outcome {
    let chain = d.prepare(
        0,
        &Op::Read {
            sector: 0,
            len: 512,
        },
    )?;
    d.place_indirect(0, 0, 1, &chain)?;
    let outer = Desc {
        addr: TABLE(1),
        len: 48,
        flags: INDIRECT,
        next: 0,
    };
    d.poke(TABLE(0), &outer.bytes())?;
    d.rings[0].set_desc(
        0,
        Desc {
            addr: TABLE(0),
            len: 16,
            flags: INDIRECT,
            next: 0,
        },
    );
    d.offer(0, 0);
    d.settled(0, 0)?;
    Ok(())
}

fn table_len(d: &mut Driver, len: u32) -> Outcome {
    let chain = d.prepare(
        0,
        &Op::Read {
            sector: 0,
            len: 512,
        },
    )?;
    d.place_indirect(0, 0, 0, &chain)?;
    d.rings[0].set_desc(
        0,
        Desc {
            addr: TABLE(0),
            len,
            flags: INDIRECT,
            next: 0,
        },
    );
    d.offer(0, 0);
    d.settled(0, 0)?;
    Ok(())
}

fn table_at(d: &mut Driver, addr: u64) -> Outcome {
    d.rings[0].set_desc(
        0,
        Desc {
            addr,
            len: 48,
            flags: INDIRECT,
            next: 0,
        },
    );
    d.offer(0, 0);
    d.settled(0, 0)?;
    Ok(())
}

fn table_across(d: &mut Driver) -> Outcome {
    let chain = d.prepare(
        0,
        &Op::Read {
            sector: 0,
            len: 512,
        },
    )?;
    let table: Vec<u8> = chain.descs(0).into_iter().flat_map(Desc::bytes).collect();
    // The seam falls into the middle of the second descriptor.
    d.poke(ADJACENT - 24, &table)?;
    d.rings[0].set_desc(
        0,
        Desc {
            addr: ADJACENT - 24,
            len: 48,
            flags: INDIRECT,
            next: 0,
        },
    );
    d.offer(0, 0);
    d.settled(0, 0)?;
    Ok(())
}

fn indirect_next(d: &mut Driver) -> Outcome {
    let chain = d.prepare(
        0,
        &Op::Read {
            sector: 0,
            len: 512,
        },
    )?;
    d.place_indirect(0, 0, 0, &chain)?;
    let flags = INDIRECT | NEXT;
    d.rings[0].set_desc(
        0,
        Desc {
            addr: TABLE(0),
            len: 48,
            flags,
            next: 1,
        },
    );
    d.rings[0].set_desc(
        1,
        Desc {
            addr: DATA(1),
            len: 1,
            flags: WRITE,
            next: 0,
        },
    );
    d.offer(0, 0);
    d.settled(0, 0)?;
    Ok(())
}

fn indirect_loop(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    d.poke(
        TABLE(0),
        &Desc {
            addr: HEADER(0),
            len: 16,
            flags: NEXT,
            next: 0,
        }
        .bytes(),
    )?;
    d.rings[0].set_desc(
        0,
        Desc {
            addr: TABLE(0),
            len: 16,
            flags: INDIRECT,
            next: 0,
        },
    );
    d.offer(0, 0);
    d.settled(0, 0)?;
    Ok(())
}

fn giant(d: &mut Driver, len: u32) -> Outcome {
    d.head(0, READ, 0)?;
    let mut chain = Chain::new().read(HEADER(0), 16);
    for _ in 0..126 {
        chain = chain.write(0, len);
    }
    answered(d, &chain.write(STATUS(0), 1), &[IOERR]).map(drop)
}

fn across(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    let chain = Chain::new()
        .read(HEADER(0), 16)
        .write(ADJACENT - 256, 512)
        .write(STATUS(0), 1);
    reads_right(d, &chain, ADJACENT - 256, 512, &[OK, IOERR])?;
    let data = Sequence::new(6).bytes(1024);
    d.poke(ADJACENT - 512, &data)?;
    d.head(0, WRITE_OUT, SCRATCH_SECTOR)?;
    let chain = Chain::new()
        .read(HEADER(0), 16)
        .read(ADJACENT - 512, 1024)
        .write(STATUS(0), 1);
    if answered(d, &chain, &[OK, IOERR])? == OK {
        let back = d.request(
            0,
            &Op::Read {
                sector: SCRATCH_SECTOR,
                len: 1024,
            },
        )?;
        must(
            back.data == data,
            "the write says OK but wrote something else",
        )?;
    }
    Ok(())
}

fn outside(d: &mut Driver, at: u64) -> Outcome {
    for kind in [READ, WRITE_OUT] {
        d.head(0, kind, 0)?;
        let chain = Chain::new().read(HEADER(0), 16);
        let chain = if kind == READ {
            chain.write(at, 512)
        } else {
            chain.read(at, 512)
        };
        answered(d, &chain.write(STATUS(0), 1), &[IOERR])?;
    }
    Ok(())
}

fn header_outside(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    let chain = Chain::new()
        .read(FAR - 4096, 16)
        .write(DATA(0), 512)
        .write(STATUS(0), 1);
    answered(d, &chain, &[IOERR]).map(drop)
}

fn status_outside(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    let chain = Chain::new()
        .read(HEADER(0), 16)
        .write(DATA(0), 512)
        .write(FAR - 4096, 1);
    d.play(0, &chain)?;
    Ok(())
}

fn short_header(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    let chain = Chain::new()
        .read(HEADER(0), 8)
        .write(DATA(0), 512)
        .write(STATUS(0), 1);
    answered(d, &chain, &[IOERR]).map(drop)
}

fn no_header(d: &mut Driver) -> Outcome {
    d.head(0, READ, 0)?;
    answered(
        d,
        &Chain::new().write(DATA(0), 512).write(STATUS(0), 1),
        &[IOERR],
    )
    .map(drop)
}

fn no_status(d: &mut Driver) -> Outcome {
    d.head(0, WRITE_OUT, 0)?;
    d.play(0, &Chain::new().read(HEADER(0), 16).read(DATA(0), 512))?;
    Ok(())
}

fn empty_status(d: &mut Driver) -> Outcome {
    d.head(0, WRITE_OUT, 0)?;
    d.play(
        0,
        &Chain::new()
            .read(HEADER(0), 16)
            .read(DATA(0), 512)
            .write(STATUS(0), 0),
    )?;
    Ok(())
}

fn empty(d: &mut Driver) -> Outcome {
    d.play(0, &Chain::new().read(HEADER(0), 0))?;
    Ok(())
}

fn jump(d: &mut Driver, by: u16) -> Outcome {
    let chain = d.prepare(
        0,
        &Op::Read {
            sector: 0,
            len: 512,
        },
    )?;
    d.place(0, 0, &chain);
    let ring = &mut d.rings[0];
    ring.publish_at(ring.next_avail().wrapping_add(by));
    ring.notify();
    let _ = ring.watch(1, std::time::Duration::from_millis(50));
    Ok(())
}

fn twice(d: &mut Driver) -> Outcome {
    let chain = d.prepare(
        0,
        &Op::Write {
            sector: SCRATCH_SECTOR,
            data: vec![9; 4096],
        },
    )?;
    d.place(0, 0, &chain);
    d.rings[0].queue(0);
    d.offer(0, 0);
    let limit = d.limit;
    d.rings[0].watch(1, limit)?;
    Ok(())
}

fn overwritten(d: &mut Driver) -> Outcome {
    for round in 0..50_u64 {
        for slot in 0..32 {
            let sector = SCRATCH_SECTOR + slot * 8;
            let chain = d.prepare(
                slot,
                &Op::Write {
                    sector,
                    data: vec![round as u8; 4096],
                },
            )?;
            d.place(0, slot as u16 * 4, &chain);
            d.rings[0].queue(slot as u16 * 4);
        }
        d.rings[0].publish();
        d.rings[0].notify();
        for index in 0..128 {
            let garbage = Desc {
                addr: u64::MAX,
                len: u32::MAX,
                flags: 7,
                next: 0x7fff,
            };
            d.rings[0].set_desc(index, garbage);
        }
        let limit = std::time::Duration::from_millis(500);
        if d.rings[0].watch(32, limit).is_err() {
            // Seen before the change or after it: a device may call it broken.
            return Ok(());
        }
    }
    Ok(())
}
