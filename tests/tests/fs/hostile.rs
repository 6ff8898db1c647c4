//! Front ends that lie in what is below FUSE: lengths, descriptors, the room for
//! replies, notifications, and in what order requests come.

use pericarp_tests::frontend::{Chain, Desc, FAR, INDIRECT, NEXT};
use pericarp_tests::fs::wire::posix::O_RDONLY;
use pericarp_tests::fs::wire::{Answer, Body, Header, ROOT, Who, feature, op};
use pericarp_tests::fs::{
    AREA, Client, Pieces, REQUEST, SLOTS, Shape, Wrong, init_body, release_body, transfer_body,
};

use crate::pattern;
use crate::stage::{Act, Ground, Outcome, must, play, said_something, turned_down};

/// A request of a LOOKUP of `health` whose header claims `len`.
fn claims(c: &mut Client, len: u32, room: u32) -> Result<Answer, Wrong> {
    let header = Header {
        len,
        opcode: op::LOOKUP,
        unique: 7,
        node: ROOT,
        who: Who::ROOT,
    };
    c.send(&[&header.bytes()[..], b"health\0"].concat(), room)
}

#[test]
fn lengths() {
    play(
        "lengths",
        vec![
            Act::new("a length of zero", |c, _| turned_down(&claims(c, 0, 144)?)),
            Act::new("a length of 1", |c, _| turned_down(&claims(c, 1, 144)?)),
            Act::new("a length shorter than the header", |c, _| {
                turned_down(&claims(c, 39, 144)?)
            }),
            Act::new("a length of the header alone", |c, _| {
                turned_down(&claims(c, 40, 144)?)
            }),
            Act::new("a length that cuts the name", |c, _| {
                turned_down(&claims(c, 44, 144)?)
            }),
            Act::new("a length one beyond the chain", |c, _| {
                turned_down(&claims(c, 48, 144)?)
            }),
            Act::new("a length of 1 MiB", |c, _| {
                turned_down(&claims(c, 1 << 20, 144)?)
            }),
            Act::new("the largest length", |c, _| {
                turned_down(&claims(c, u32::MAX, 144)?)
            }),
            Act::new("a request of one byte", |c, _| {
                turned_down(&c.send(&[1], 144)?)
            }),
            Act::new("a request of 39 bytes", |c, _| {
                turned_down(&c.send(&[39; 39], 144)?)
            }),
            Act::new("a body of zeros for every request", |c, _| {
                every_opcode(c, |c, opcode| c.request(opcode, ROOT, &[0; 128]).1)
            }),
            Act::new("no body for every request", |c, _| {
                every_opcode(c, |c, opcode| c.request(opcode, ROOT, &[]).1)
            }),
            Act::new("a body of ones for every request", |c, _| {
                every_opcode(c, |c, opcode| c.request(opcode, ROOT, &[0xff; 200]).1)
            }),
            Act::new("a body of seven bytes for every request", |c, _| {
                every_opcode(c, |c, opcode| c.request(opcode, ROOT, &[1; 7]).1)
            }),
            Act::new("a body of 64 KiB", |c, _| {
                let (_, request) = c.request(op::LOOKUP, ROOT, &vec![b'x'; 1 << 16]);
                turned_down(&c.send(&request, 144)?)
            }),
            Act::new("a body of 4 MiB", |c, _| {
                let (_, request) = c.request(op::SYMLINK, ROOT, &vec![b'x'; 4 << 20]);
                turned_down(&c.send(&request, 144)?)
            }),
        ],
    );
}

/// Sends a request of each number up to 64, INIT and DESTROY aside. What is
/// there and what is not may be answered in any way.
fn every_opcode(c: &mut Client, make: fn(&mut Client, u32) -> Vec<u8>) -> Outcome {
    for opcode in (0..64).filter(|opcode| ![op::INIT, op::DESTROY].contains(opcode)) {
        let request = make(c, opcode);
        let answer = c
            .send(&request, 4096)
            .map_err(|wrong| format!("opcode {opcode}: {wrong}"))?;
        must(
            answer.used == 0 || answer.used == answer.len,
            format!("opcode {opcode}: {} of {} bytes", answer.used, answer.len),
        )?;
    }
    Ok(())
}

#[test]
fn room() {
    play(
        "room",
        vec![
            Act::new("no room for a reply", |c, _| no_room(c, 0)),
            Act::new("room of one byte", |c, _| no_room(c, 1)),
            Act::new("room of 15 bytes", |c, _| no_room(c, 15)),
            Act::new("room for the header alone", |c, _| no_room(c, 16)),
            Act::new("room one byte short", |c, _| no_room(c, 143)),
            Act::new("a READ with no room", |c, g| read_into(c, g, 0)),
            Act::new("a READ with room of 15 bytes", |c, g| read_into(c, g, 15)),
            Act::new("a READ with room for the header", |c, g| {
                read_into(c, g, 16)
            }),
            Act::new("a READ with room for 100 bytes", |c, g| {
                read_into(c, g, 116)
            }),
            Act::new("a READ of 4 GiB with room for 4 KiB", |c, g| {
                let body = transfer_body(g.fh, 0, u32::MAX, 0);
                let (_, request) = c.request(op::READ, g.file.node, &body.0);
                let answer = c.send(&request, 4112)?;
                must(
                    answer.error < 0 || answer.body == pattern(78, 4096),
                    format!("{answer:?}"),
                )
            }),
            Act::new("a listing larger than its room", |c, g| {
                let body = transfer_body(g.dirh, 0, u32::MAX, 0);
                let (_, request) = c.request(op::READDIR, g.dir.node, &body.0);
                said_something(Ok(c.send(&request, 60)?))?;
                let (_, request) = c.request(op::READDIRPLUS, g.dir.node, &body.0);
                said_something(Ok(c.send(&request, 17)?))
            }),
            Act::new("a WRITE with no room", |c, g| {
                let body = transfer_body(g.fh, 0, 4, 0).bytes(b"data");
                let (_, request) = c.request(op::WRITE, g.file.node, &body.0);
                for room in [0, 3, 15, 16, 20] {
                    turned_down(&c.send(&request, room)?)?;
                }
                Ok(())
            }),
            Act::new("a FORGET with room", |c, g| {
                let (_, request) = c.request(op::FORGET, g.dir.node, &[0; 8]);
                must(c.send(&request, 144)?.used == 0, "FORGET is answered")
            }),
            Act::new("reply split byte by byte", |c, g| {
                c.shape.reply = Pieces::Of(1);
                split(c, g)
            }),
            Act::new("request split byte by byte", |c, g| {
                c.shape.request = Pieces::Of(1);
                split(c, g)
            }),
            Act::new("both split byte by byte, indirect", |c, g| {
                c.shape = Shape {
                    request: Pieces::Of(1),
                    reply: Pieces::Of(1),
                    indirect: true,
                };
                split(c, g)
            }),
        ],
    );
}

fn no_room(c: &mut Client, room: u32) -> Outcome {
    let (_, request) = c.request(op::LOOKUP, ROOT, b"health\0");
    turned_down(&c.send(&request, room)?)?;
    let (_, request) = c.request(op::GETATTR, ROOT, &[0; 16]);
    turned_down(&c.send(&request, room.min(119))?)
}

fn read_into(c: &mut Client, g: &Ground, room: u32) -> Outcome {
    let body = transfer_body(g.fh, 0, 4096, 0);
    let (_, request) = c.request(op::READ, g.file.node, &body.0);
    let answer = c.send(&request, room)?;
    let want = &pattern(78, 4096)[..answer.body.len()];
    must(
        answer.used <= room && (answer.error < 0 || answer.body == want),
        format!("{answer:?}"),
    )
}

fn split(c: &mut Client, g: &Ground) -> Outcome {
    let attr = c.getattr(g.file.node)?;
    must(attr.size == 8192, "the wrong size")?;
    let read = c.read(g.file.node, g.fh, 100, 60)?;
    must(read == pattern(78, 8192)[100..160], "a read has wrong data")?;
    let data = pattern(5, 60);
    must(
        c.write(g.file.node, g.fh, 10, &data)? == 60,
        "a short write",
    )?;
    let read = c.read(g.file.node, g.fh, 10, 60)?;
    must(read == data, "a write has wrong data")
}

#[test]
fn descriptors() {
    play(
        "descriptors",
        vec![
            Act::new("a descriptor that is its own successor", |c, _| {
                looped(c, 1)
            }),
            Act::new("a loop of two descriptors", |c, _| looped(c, 2)),
            Act::new("a loop through the whole ring", |c, _| looped(c, 256)),
            Act::new("a successor beyond the ring", |c, _| successor(c, 256)),
            Act::new("successor 65535", |c, _| successor(c, u16::MAX)),
            Act::new("indirect in indirect", nested),
            Act::new("a loop in an indirect table", |c, _| {
                let entry = Desc {
                    addr: REQUEST,
                    len: 40,
                    flags: NEXT,
                    next: 0,
                };
                c.driver.poke(Client::table(), &entry.bytes())?;
                table(c, Client::table(), 16)
            }),
            Act::new("an indirect table of no entries", |c, _| {
                table(c, Client::table(), 0)
            }),
            Act::new("an indirect table of 4 GiB", |c, _| {
                table(c, Client::table(), 0xffff_fff0)
            }),
            Act::new("an indirect table outside memory", |c, _| {
                table(c, FAR - 4096, 64)
            }),
            Act::new("a request outside memory", |c, _| {
                outside(c, FAR - 8192, AREA)
            }),
            Act::new("a request that wraps around", |c, _| {
                outside(c, u64::MAX - 15, AREA)
            }),
            Act::new("a reply outside memory", |c, _| {
                outside(c, REQUEST, FAR - 8192)
            }),
            Act::new("a reply that wraps around", |c, _| {
                outside(c, REQUEST, u64::MAX - 15)
            }),
            Act::new("READ data outside memory", |c, g| {
                let body = transfer_body(g.fh, 0, 4096, 0);
                data_outside(c, op::READ, g, body, FAR - 8192)
            }),
            Act::new("READ data half outside memory", |c, g| {
                let body = transfer_body(g.fh, 0, 4096, 0);
                data_outside(c, op::READ, g, body, FAR - 2048)
            }),
            Act::new("READ data that wraps around", |c, g| {
                let body = transfer_body(g.fh, 0, 4096, 0);
                data_outside(c, op::READ, g, body, u64::MAX - 2047)
            }),
            Act::new("writable before readable", |c, _| {
                let (_, request) = c.request(op::GETATTR, ROOT, &[0; 16]);
                c.driver.poke(REQUEST, &request)?;
                c.play(&Chain::new().write(AREA, 120).read(REQUEST, 56))?;
                Ok(())
            }),
            Act::new("nothing readable", |c, _| {
                c.play(&Chain::new().write(AREA, 120))?;
                Ok(())
            }),
            Act::new("an empty descriptor alone", |c, _| {
                c.play(&Chain::new().read(REQUEST, 0))?;
                Ok(())
            }),
            Act::new("empty descriptors between", |c, _| {
                let (_, request) = c.request(op::GETATTR, ROOT, &[0; 16]);
                c.driver.poke(REQUEST, &request)?;
                let chain = Chain::new().read(REQUEST, 0).read(REQUEST, 40);
                let chain = chain.read(REQUEST, 0).read(REQUEST + 40, 16);
                c.play(&chain.write(AREA, 0).write(AREA, 120))?;
                Ok(())
            }),
            Act::new("a head beyond the ring", |c, _| {
                c.driver.offer(1, 256);
                Ok(())
            })
            .reconnect(),
            Act::new("the available index jumps", |c, _| {
                let at = c.driver.rings[1].next_avail().wrapping_add(0x8000);
                c.driver.rings[1].publish_at(at);
                c.driver.rings[1].notify();
                Ok(())
            })
            .reconnect(),
        ],
    );
}

fn looped(c: &mut Client, count: u16) -> Outcome {
    let (_, request) = c.request(op::GETATTR, ROOT, &[0; 16]);
    c.driver.poke(REQUEST, &request)?;
    for i in 0..count {
        let desc = Desc {
            addr: REQUEST,
            len: 40,
            flags: NEXT,
            next: (i + 1) % count,
        };
        c.driver.rings[1].set_desc(i, desc);
    }
    c.driver.offer(1, 0);
    c.driver.settled(1, 0)?;
    Ok(())
}

fn successor(c: &mut Client, next: u16) -> Outcome {
    let desc = Desc {
        addr: REQUEST,
        len: 40,
        flags: NEXT,
        next,
    };
    c.driver.rings[1].set_desc(0, desc);
    c.driver.offer(1, 0);
    c.driver.settled(1, 0)?;
    Ok(())
}

/// Descriptor 0 is a table of `len` bytes at `addr`.
fn table(c: &mut Client, addr: u64, len: u32) -> Outcome {
    let desc = Desc {
        addr,
        len,
        flags: INDIRECT,
        next: 0,
    };
    c.driver.rings[1].set_desc(0, desc);
    c.driver.offer(1, 0);
    c.driver.settled(1, 0)?;
    Ok(())
}

fn nested(c: &mut Client, _: &Ground) -> Outcome {
    let inner = Desc {
        addr: Client::table() + 64,
        len: 32,
        flags: INDIRECT,
        next: 0,
    };
    let pair = Chain::new().read(REQUEST, 56).write(AREA, 120);
    let pair: Vec<u8> = pair.descs(0).into_iter().flat_map(Desc::bytes).collect();
    c.driver.poke(Client::table(), &inner.bytes())?;
    c.driver.poke(Client::table() + 64, &pair)?;
    table(c, Client::table(), 16)
}

fn outside(c: &mut Client, request: u64, area: u64) -> Outcome {
    let (_, bytes) = c.request(op::GETATTR, ROOT, &[0; 16]);
    c.driver.poke(REQUEST, &bytes)?;
    let used = c.play(&Chain::new().read(request, 56).write(area, 120))?;
    must(
        used.len <= 16 || request == REQUEST,
        format!("{} bytes for no request", used.len),
    )
}

fn data_outside(c: &mut Client, opcode: u32, g: &Ground, body: Body, at: u64) -> Outcome {
    let (_, bytes) = c.request(opcode, g.file.node, &body.0);
    c.driver.poke(REQUEST, &bytes)?;
    c.spoil(AREA, 16)?;
    let chain = Chain::new().read(REQUEST, bytes.len() as u32);
    let used = c.play(&chain.write(AREA, 16).write(at, 4096))?;
    turned_down(&c.read_back(used, AREA, 16)?)
}

#[test]
fn order() {
    play(
        "order",
        vec![
            Act::new("LOOKUP before INIT", |c, _| {
                said_something(c.lookup(ROOT, "health"))
            })
            .before_init(),
            Act::new("every request before INIT", |c, _| {
                every_opcode(c, |c, opcode| c.request(opcode, ROOT, &[0; 128]).1)
            })
            .before_init(),
            Act::new("INIT of version 6", |c, _| version(c, 6, 41)).before_init(),
            Act::new("INIT of version 0", |c, _| version(c, 0, 0)).before_init(),
            Act::new("INIT of version 7.0", |c, _| version(c, 7, 0)).before_init(),
            Act::new("INIT of version 7.12", |c, _| version(c, 7, 12)).before_init(),
            Act::new("INIT of a later minor version", |c, _| {
                let agreed = c.init_as(7, 9999, feature::LINUX)?;
                must(
                    agreed.major == 7 && agreed.minor <= 60,
                    format!("{agreed:?}"),
                )
            })
            .before_init(),
            // A later version is answered with ours, and the guest tries again.
            Act::new("INIT of version 8", |c, _| {
                let agreed = c.init_as(8, 0, feature::LINUX)?;
                must(agreed.major == 7, format!("{agreed:?}"))
            })
            .before_init(),
            Act::new("INIT of version 2^32 - 1", |c, _| {
                let agreed = c.init_as(u32::MAX, u32::MAX, u64::MAX)?;
                must(agreed.major == 7, format!("{agreed:?}"))
            })
            .before_init(),
            Act::new("INIT with every feature", |c, _| {
                c.init_as(7, 41, u64::MAX).map(drop).map_err(Into::into)
            })
            .before_init(),
            Act::new("INIT with no feature", |c, _| {
                c.init_as(7, 41, 0).map(drop).map_err(Into::into)
            })
            .before_init(),
            Act::new("a short INIT", |c, _| {
                let (_, request) = c.request(op::INIT, 0, &init_body(7, 41, 0).0[..7]);
                turned_down(&c.send(&request, 80)?)
            })
            .before_init(),
            Act::new("INIT twice", |c, _| said_something(c.init())).ends(),
            Act::new("DESTROY", |c, _| said_something(c.destroy())).ends(),
            Act::new("DESTROY twice, then a READ", |c, g| {
                said_something(c.destroy())?;
                said_something(c.destroy())?;
                said_something(c.read(g.file.node, g.fh, 0, 16))
            })
            .ends(),
            Act::new("DESTROY among READs", |c, g| {
                amid(c, g, &[(op::DESTROY, vec![])])
            })
            .ends(),
            Act::new("INIT among READs", |c, g| {
                amid(c, g, &[(op::INIT, init_body(7, 41, feature::LINUX).0)])
            })
            .ends(),
            Act::new("DESTROY and INIT among READs", |c, g| {
                let init = (op::INIT, init_body(7, 41, feature::LINUX).0);
                amid(c, g, &[(op::DESTROY, vec![]), init.clone(), init])
            })
            .ends(),
            Act::new("RELEASE among READs", |c, g| {
                amid(c, g, &[(op::RELEASE, release_body(g.fh).0)])
            }),
            Act::new("RELEASE twice among READs", |c, g| {
                let release = (op::RELEASE, release_body(g.fh).0);
                amid(c, g, &[release.clone(), release])
            }),
            Act::new("FORGET among READs", |c, g| {
                let forget = (op::FORGET, u64::MAX.to_le_bytes().to_vec());
                amid(c, g, &[forget.clone(), forget])
            }),
            Act::new("a front end that leaves in the middle", |c, g| {
                for slot in 0..SLOTS {
                    let body = transfer_body(g.fh, 0, 4000, 0);
                    c.begin(slot, op::READ, g.file.node, body, 4000)?;
                }
                c.go();
                Ok(())
            })
            .reconnect(),
            Act::new("the ring is stopped in the middle", |c, g| {
                for slot in 0..SLOTS {
                    let body = transfer_body(g.fh, 0, 4000, 0);
                    c.begin(slot, op::READ, g.file.node, body, 4000)?;
                }
                c.go();
                c.driver.stop(1)?;
                Ok(())
            })
            .reconnect(),
        ],
    );
}

/// A version from before what virtio-fs needs.
fn version(c: &mut Client, major: u32, minor: u32) -> Outcome {
    let answer = c.init_as(major, minor, feature::LINUX);
    match answer {
        Err(Wrong::Refused(_)) => Ok(()),
        other => Err(format!("{major}.{minor} is served: {other:?}").into()),
    }
}

/// Other requests between READs, all visible at once. All are completed; a READ
/// has the file's data or an error.
fn amid(c: &mut Client, g: &Ground, others: &[(u32, Vec<u8>)]) -> Outcome {
    let mut reads = Vec::new();
    for round in 0..60 {
        let slot = round as u16;
        if round % 10 == 5
            && let Some((opcode, body)) = others.get(round / 10)
        {
            let node = if *opcode == op::INIT { 0 } else { g.file.node };
            let room = if *opcode == op::FORGET { 0 } else { 64 };
            c.begin(slot, *opcode, node, body.clone(), room)?;
        } else {
            let body = transfer_body(g.fh, u64::from(slot) * 64, 2048, 0);
            c.begin(slot, op::READ, g.file.node, body, 2048)?;
            reads.push(slot);
        }
    }
    c.go();
    let data = pattern(78, 8192);
    let all = c.finish(60)?;
    must(all.len() == 60, format!("{} completed", all.len()))?;
    for (slot, answer) in all {
        if reads.contains(&slot) && answer.error == 0 {
            let at = usize::from(slot) * 64;
            must(
                answer.body == data[at..at + 2048],
                format!("slot {slot}: wrong data"),
            )?;
        }
    }
    Ok(())
}

#[test]
fn queues() {
    play(
        "queues",
        vec![
            Act::new("FORGET on the high priority queue", |c, g| {
                c.queue = 0;
                c.forget(g.dir.node, 1)?;
                c.batch_forget(&[(g.dir.node, 1), (12345, 1)])?;
                c.queue = 1;
                Ok(())
            }),
            Act::new("requests on the high priority queue", |c, g| {
                c.queue = 0;
                said_something(c.lookup(ROOT, "health"))?;
                said_something(c.read(g.file.node, g.fh, 0, 100))?;
                said_something(c.write(g.file.node, g.fh, 0, b"x"))?;
                every_opcode(c, |c, opcode| c.request(opcode, ROOT, &[0; 128]).1)
            }),
            Act::new("INTERRUPT of nothing", |c, _| {
                c.queue = 0;
                let (_, request) = c.request(op::INTERRUPT, 0, &4711u64.to_le_bytes());
                c.send(&request, 0)?;
                c.queue = 1;
                let (_, request) = c.request(op::INTERRUPT, 0, &4711u64.to_le_bytes());
                c.send(&request, 16)?;
                Ok(())
            }),
            Act::new("every head at once, 20 times", |c, g| flood(c, g)),
            Act::new("kicks without work", |c, _| {
                for _ in 0..1000 {
                    c.driver.rings[0].notify();
                    c.driver.rings[1].notify();
                }
                Ok(())
            }),
        ],
    );
}

/// A mix of everything, as much as the ring holds, over and over.
fn flood(c: &mut Client, g: &Ground) -> Outcome {
    for round in 0..20u64 {
        for slot in 0..SLOTS {
            let name: &[u8] = if slot % 2 == 0 {
                b"health\0"
            } else {
                b"none\0"
            };
            let at = (u64::from(slot) * 31 + round) % 4096;
            match slot % 5 {
                0 => c.begin(slot, op::LOOKUP, ROOT, name, 128)?,
                1 => c.begin(slot, op::GETATTR, g.file.node, [0; 16], 104)?,
                2 => {
                    let body = transfer_body(g.fh, at, 4000, 0);
                    c.begin(slot, op::READ, g.file.node, body, 4000)?
                }
                3 => {
                    let body = transfer_body(g.fh, 8192 + at, 900, 0);
                    let body = body.bytes(&pattern(6, 900));
                    c.begin(slot, op::WRITE, g.file.node, body, 8)?
                }
                _ => {
                    let body = Body::new().u32(O_RDONLY).u32(0);
                    c.begin(slot, op::OPEN, g.file.node, body, 16)?
                }
            };
        }
        c.go();
        let mut opened = Vec::new();
        for (slot, answer) in c.finish(SLOTS.into())? {
            let fine = answer.error == 0 || (slot % 5 == 0 && slot % 2 == 1);
            must(fine, format!("slot {slot}: {answer:?}"))?;
            if slot % 5 == 4 {
                opened.push(pericarp_tests::fs::wire::handle(&answer.body));
            }
        }
        for fh in opened {
            c.release(g.file.node, fh)?;
        }
    }
    Ok(())
}
