//! What becomes of containers: their start, their limits, their end, and the machine's.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use pericarp_api::agent::{CreateContainerRequest, Empty};
use pericarp_api::{ExitReport, StreamKind, hello};
use pericarp_tests::bounded::poll;
use ttrpc::Code;

use crate::conversation::Wish;
use crate::refusals::refused;
use crate::rig::{LIMIT, MIB, Machine, limited};

const MOST_RESIDENT: u64 = 4 << 20;

pub(crate) fn nothing_goes_before_configure(machine: &Machine) {
    let request = CreateContainerRequest {
        container: "early".into(),
        ..CreateContainerRequest::default()
    };
    let created = machine.client().create_container(limited(), &request);
    assert_eq!(refused(created).0, Code::FAILED_PRECONDITION);
}

pub(crate) fn the_first_container(machine: &Machine) {
    let began = Instant::now();
    let process = machine.create(
        "first",
        &Wish::run(&["sh", "-c", "hostname; uname -r; exit 7"]),
    );
    let process = process.unwrap_or_else(|error| panic!("{error}\n{}", machine.console()));
    let created = began.elapsed();
    let pid = process
        .start()
        .unwrap_or_else(|error| panic!("{error}\n{}", machine.console()));
    let started = began.elapsed();
    assert!(pid > 1);
    let ended = process.finish(b"");
    println!(
        "created {created:?}, started {started:?}, ended {:?}",
        began.elapsed()
    );
    assert_eq!(ended.report, ExitReport::Code(7));
    assert!(ended.text().contains("cloud-amd64"), "{ended:?}");
    machine.remove("first");
}

/// Idle, with one container.
pub(crate) fn the_agent_is_small(machine: &Machine) {
    let process = machine
        .create("small", &Wish::run(&["sleep", "1000"]))
        .unwrap();
    process.start().unwrap();
    let stats = machine.stats("small");
    println!(
        "agent: {} KiB resident, {} threads, {} files; container: {} KiB",
        stats.agent_rss / 1024,
        stats.agent_threads,
        stats.agent_open_files,
        stats.container.memory_bytes / 1024
    );
    assert!(
        stats.agent_rss <= MOST_RESIDENT,
        "{} bytes resident",
        stats.agent_rss
    );
    assert!(stats.memory_total > 300 * MIB && stats.memory_available < stats.memory_total);
    assert_eq!(stats.container.processes, 1);
    assert!(stats.container.memory_bytes > 0 && stats.container.cpu_usec > 0);
    machine.remove("small");
    assert_eq!(
        process.finish(b"").report,
        ExitReport::Signal {
            signal: 9,
            out_of_memory: false
        }
    );
    // Nothing stays of a container, as far as can be seen from here: no descriptor, no thread.
    let less = poll(LIMIT, || {
        let now = machine.stats("");
        (now.agent_open_files < stats.agent_open_files && now.agent_threads < stats.agent_threads)
            .then_some(())
    });
    assert!(less.is_some());
}

pub(crate) fn ends_are_reported_as_they_were(machine: &Machine) {
    let main = machine
        .create("ends", &Wish::run(&["sleep", "1000"]))
        .unwrap();
    main.start().unwrap();
    let signal = |signal| ExitReport::Signal {
        signal,
        out_of_memory: false,
    };
    for (number, (script, report)) in [
        ("exit 0", ExitReport::Code(0)),
        ("exit 7", ExitReport::Code(7)),
        ("exit 255", ExitReport::Code(255)),
        ("kill -TERM $$", signal(15)),
        ("kill -KILL $$", signal(9)),
        ("kill -SEGV $$", signal(11)),
    ]
    .into_iter()
    .enumerate()
    {
        let ended = machine.run_in(
            "ends",
            &format!("p{number}"),
            &Wish::run(&["sh", "-c", script]),
        );
        assert_eq!(ended.report, report, "{script}");
    }
    // An id may be used again once its process has been reported.
    let ended = machine.run_in("ends", "p0", &Wish::run(&["true"]));
    assert_eq!(ended.report, ExitReport::Code(0));
    machine.remove("ends");
}

pub(crate) fn users_are_the_containers_own(machine: &Machine) {
    let script = "echo $(id -u) $(id -g) $(id -G) $HOME";
    let args = ["sh", "-c", script];
    let web = Wish {
        user: "web",
        ..Wish::run(&["sleep", "1000"])
    };
    let main = machine.create("users", &web).unwrap();
    main.start().unwrap();
    for (number, (user, seen)) in [
        ("", "33 33 33 4 /tmp\n"),
        ("root", "0 0 0 /root\n"),
        ("web", "33 33 33 4 /tmp\n"),
        ("33:log", "33 4 4 /tmp\n"),
        ("1234", "1234 0 0 /\n"),
        ("1234:77", "1234 77 77 /\n"),
    ]
    .into_iter()
    .enumerate()
    {
        let wish = Wish {
            user,
            ..Wish::run(&args)
        };
        let ended = machine.run_in("users", &format!("u{number}"), &wish);
        assert_eq!(ended.text(), seen, "{user}: {ended:?}");
    }
    let stranger = Wish {
        user: "nobody",
        ..Wish::run(&args)
    };
    let (code, message) = refused(machine.exec("users", "stranger", &stranger).map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    machine.remove("users");
    // Its image's directory is made for the user, as podman does.
    let wish = Wish {
        user: "web",
        cwd: "/srv/new",
        ..Wish::run(&["sh", "-c", "pwd; touch mine; ls"])
    };
    assert_eq!(machine.run("directory", &wish).text(), "/srv/new\nmine\n");
}

pub(crate) fn layers_are_written_and_forgotten(machine: &Machine) {
    let script =
        "cat /etc/passwd >/big && rm /etc/group && echo new >/etc/new && sync && ls /etc /big";
    let ended = machine.run("layer", &Wish::run(&["sh", "-c", script]));
    assert_eq!(
        ended.text(),
        "/big\n\n/etc:\nnew\nno-format\nno-interpreter\nnot-executable\npasswd\n",
        "{ended:?}"
    );
    let ended = machine.run("layer", &Wish::run(&["ls", "/etc"]));
    assert_eq!(
        ended.text(),
        "group\nno-format\nno-interpreter\nnot-executable\npasswd\n"
    );
}

pub(crate) fn a_plain_root_keeps_what_is_written(machine: &Machine) {
    let plain = |args: &[&'static str]| Wish {
        disk: "plain",
        writable_layer: false,
        ..Wish::run(args)
    };
    let ended = machine.run("plain", &plain(&["sh", "-c", "echo kept >/kept"]));
    assert_eq!(ended.report, ExitReport::Code(0), "{ended:?}");
    assert_eq!(
        machine.run("plain", &plain(&["cat", "/kept"])).text(),
        "kept\n"
    );
    // Left there, written to and running, for the power-off.
    let left = machine.create(
        "left",
        &plain(&["sh", "-c", "while :; do echo x >>/log; done"]),
    );
    left.unwrap().start().unwrap();
}

pub(crate) fn disks_are_shown_as_devices(machine: &Machine) {
    let script = "printf 'to a device' | dd of=/dev/data conv=notrunc 2>/dev/null; sync; \
                  head -c 11 /dev/data; ls /dev | grep vd; true";
    let wish = Wish {
        device: Some("data"),
        ..Wish::run(&["sh", "-c", script])
    };
    assert_eq!(machine.run("device", &wish).text(), "to a device");
    let missing = Wish {
        device: Some("nowhere"),
        ..Wish::run(&["true"])
    };
    let (code, message) = refused(machine.create("device", &missing).map(drop));
    assert!(
        code == Code::NOT_FOUND && message.contains("'nowhere' did not appear"),
        "{message}"
    );
}

pub(crate) fn orphans_are_reaped(machine: &Machine) {
    let main = machine
        .create(
            "orphans",
            &Wish::run(&["sh", "-c", "while :; do sleep 1; done"]),
        )
        .unwrap();
    main.start().unwrap();
    let script = "for i in 1 2 3 4 5 6 7 8 9 10; do (setsid sh -c 'sleep 0.1' &) ; done";
    let ended = machine.run_in("orphans", "p", &Wish::run(&["sh", "-c", script]));
    assert_eq!(ended.report, ExitReport::Code(0));
    // The shell collects them, as the first process of a container has to.
    let gone = poll(LIMIT, || {
        (machine.stats("orphans").container.processes <= 2).then_some(())
    });
    assert!(gone.is_some());
    let ended = machine.run_in("orphans", "ps", &Wish::run(&["ps"]));
    assert!(!ended.text().contains("[s"), "{}", ended.text());
    machine.remove("orphans");
}

pub(crate) fn signals_reach_one_or_all(machine: &Machine) {
    let script = "trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    // The first process takes the others with it: it lets them speak first.
    let last = script.replace("exit", "sleep 2; exit");
    let mut main = machine
        .create("kills", &Wish::run(&["sh", "-c", &last]))
        .unwrap();
    let (code, _) = refused(main.signal(15, false));
    assert_eq!(code, Code::NOT_FOUND);
    main.start().unwrap();
    main.read_until("ready\n");
    let mut other = machine
        .exec("kills", "other", &Wish::run(&["sh", "-c", script]))
        .unwrap();
    other.start().unwrap();
    other.read_until("ready\n");
    other.signal(15, false).unwrap();
    assert_eq!(other.report(), ExitReport::Code(3));
    assert_eq!(refused(other.signal(15, false)).0, Code::NOT_FOUND);
    for none in [0, 65, 99] {
        assert_eq!(refused(main.signal(none, false)).0, Code::INVALID_ARGUMENT);
    }
    // Signals without a name, by which some images are stopped: SIGRTMIN+3, and the last.
    for signal in [37, 64] {
        let mut other = machine
            .exec(
                "kills",
                &format!("real-time-{signal}"),
                &Wish::run(&["sleep", "1000"]),
            )
            .unwrap();
        other.start().unwrap();
        other.signal(signal.into(), false).unwrap();
        let report = ExitReport::Signal {
            signal,
            out_of_memory: false,
        };
        assert_eq!(other.report(), report);
    }
    // All: the two shells, and not only the first.
    let mut other = machine
        .exec("kills", "another", &Wish::run(&["sh", "-c", script]))
        .unwrap();
    other.start().unwrap();
    other.read_until("ready\n");
    main.signal(15, true).unwrap();
    assert_eq!(other.finish(b"").text(), "told\n");
    assert_eq!(main.report(), ExitReport::Code(3));
    machine.remove("kills");
    // What a container leaves behind ends with it.
    let main = machine
        .create("kills", &Wish::run(&["sh", "-c", "sleep 1000 & sleep 0.1"]))
        .unwrap();
    main.start().unwrap();
    let mut other = machine
        .exec("kills", "other", &Wish::run(&["sleep", "1000"]))
        .unwrap();
    // The container may be over before.
    if other.start().is_ok() {
        assert_eq!(
            other.report(),
            ExitReport::Signal {
                signal: 9,
                out_of_memory: false
            }
        );
    }
    assert_eq!(main.finish(b"").report, ExitReport::Code(0));
    machine.remove("kills");
}

pub(crate) fn running_out_of_memory_ends_one_container(machine: &Machine) {
    let neighbour = machine.create("neighbour", &Wish::run(&["cat"])).unwrap();
    neighbour.start().unwrap();
    let wish = Wish {
        memory: Some(16 * MIB),
        ..Wish::run(&["tail", "/dev/zero"])
    };
    let process = machine.create("hungry", &wish).unwrap();
    process.start().unwrap();
    let oom = ExitReport::Signal {
        signal: 9,
        out_of_memory: true,
    };
    assert_eq!(process.finish(b"").report, oom);
    assert!(machine.stats("hungry").container.oom_kills > 0);
    machine.remove("hungry");
    // One that is killed by hand in such a container has not run out of memory.
    let wish = Wish {
        memory: Some(16 * MIB),
        ..Wish::run(&["sleep", "1000"])
    };
    let mut process = machine.create("hungry", &wish).unwrap();
    process.start().unwrap();
    process.signal(9, false).unwrap();
    assert_eq!(
        process.report(),
        ExitReport::Signal {
            signal: 9,
            out_of_memory: false
        }
    );
    machine.remove("hungry");
    // Without a limit of its own it is held to what all containers may use.
    let process = machine
        .create(
            "hungry",
            &Wish::run(&["dd", "if=/dev/zero", "of=/dev/null", "bs=440M"]),
        )
        .unwrap();
    process.start().unwrap();
    assert_eq!(process.finish(b"").report, oom);
    machine.remove("hungry");
    assert_eq!(neighbour.finish(b"still here").text(), "still here");
    machine.remove("neighbour");
}

/// No namespace of its own ends such a container's processes: the agent does, those that come in
/// at that moment, too.
pub(crate) fn a_container_among_shared_processes_ends_whole(machine: &Machine) {
    let shared = |args: &[&'static str]| Wish {
        shared_processes: true,
        ..Wish::run(args)
    };
    let first = machine.run(
        "first",
        &shared(&["sh", "-c", "cat /proc/1/status; echo $$"]),
    );
    assert!(first.text().contains("NoNewPrivs:\t1\n"), "{first:?}");
    let mut late = 0;
    for pause in ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6"] {
        let own = machine.create("whole", &shared(&["sleep", pause])).unwrap();
        own.start().unwrap();
        let Ok(mut other) = machine.exec("whole", "other", &Wish::run(&["sleep", "1000"])) else {
            machine.remove("whole");
            continue;
        };
        // The container may be over before.
        if other.start().is_ok() {
            late += 1;
            let killed = ExitReport::Signal {
                signal: 9,
                out_of_memory: false,
            };
            assert_eq!(other.report(), killed);
        }
        assert_eq!(own.finish(b"").report, ExitReport::Code(0));
        let gone = poll(LIMIT, || {
            (machine.stats("whole").container.processes == 0).then_some(())
        });
        assert!(gone.is_some());
        machine.remove("whole");
    }
    println!("{late} processes came before the end");
}

/// Who listens for want of memory hears of the end of the container, and nothing of it stays.
pub(crate) fn the_memory_of_a_removed_container_is_watched_by_nobody(machine: &Machine) {
    let threads = || machine.stats("").agent_threads;
    let process = machine
        .create("watched", &Wish::run(&["sleep", "1000"]))
        .unwrap();
    process.start().unwrap();
    let before = threads();
    let listening: Vec<_> = (0..16)
        .map(|_| machine.attach(StreamKind::OutOfMemory, "watched", ""))
        .collect();
    machine.remove("watched");
    for mut one in &listening {
        assert_eq!(one.read(&mut [0]).unwrap(), 0);
    }
    // The host's ends are still there.
    let fewer = poll(LIMIT, || (threads() <= before).then_some(()));
    assert!(fewer.is_some(), "{} threads, {before} before", threads());
    drop(listening);
    // What ends the container is told before the end is.
    let wish = Wish {
        memory: Some(16 * MIB),
        ..Wish::run(&["sh", "-c", "read go; exec tail /dev/zero"])
    };
    let process = machine.create("hungry", &wish).unwrap();
    process.start().unwrap();
    let mut listens = machine.attach(StreamKind::OutOfMemory, "hungry", "");
    let ended = process.finish(b"go\n");
    let oom = ExitReport::Signal {
        signal: 9,
        out_of_memory: true,
    };
    assert_eq!(ended.report, oom);
    let mut told = Vec::new();
    listens.read_to_end(&mut told).unwrap();
    assert_eq!(told, [1]);
    machine.remove("hungry");
}

pub(crate) fn a_fork_bomb_leaves_the_agent_alone(machine: &Machine) {
    let script = "b() { b | b & }; b; while :; do :; done";
    let bomb = machine
        .create("bomb", &Wish::run(&["sh", "-c", script]))
        .unwrap();
    bomb.start().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    println!(
        "the bomb: {} processes",
        machine.stats("bomb").container.processes
    );
    let began = Instant::now();
    machine.remove("bomb");
    println!("removed after {:?}", began.elapsed());
    assert_eq!(
        machine.run("after", &Wish::run(&["echo", "well"])).text(),
        "well\n"
    );
}

/// The container `left` is running and writing.
pub(crate) fn power_off_leaves_clean_disks(machine: &mut Machine) {
    let began = Instant::now();
    let request = Empty::default();
    let answer = machine.client().power_off(limited(), &request);
    answer.unwrap_or_else(|error| panic!("{error}\n{}", machine.console()));
    println!("answered after {:?}", began.elapsed());
    machine.wait_off();
    // No last words: all is well.
    let mut words = String::new();
    let _ = machine.hello.read_to_string(&mut words);
    assert_eq!(words, "");
    let _ = machine.hello.flush();
}

/// A thread that cannot be made is a panic in ttrpc. Only the host can bring that about, so it is
/// fair; what counts is that the end is told.
pub(crate) fn last_words_are_heard(machine: &mut Machine) {
    // As many as there can be: at some point nobody answers any more.
    let mut clients = Vec::new();
    while clients.len() < 100
        && let Ok(client) = machine.guest.client()
    {
        clients.push(client);
    }
    machine.wait_off();
    let words = hello::last_words(&machine.hello);
    let words = words.unwrap_or_else(|| panic!("no last words: {}", machine.console()));
    println!("{} connections, then: {words}", clients.len());
    assert!(words.matches("panicked").count() == 1, "{words}");
}
