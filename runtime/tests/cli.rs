//! The command line beside runc's: the same calls of both, and what each answers.
//!
//! A line of a table is `call | words of both errors | difference`. Without a difference the exit codes, the shape of
//! what is printed and the container's state afterwards are the same. `usage` is a call that is refused before anything is
//! done: runc then prints its help and ends with 1 (3 for an unknown command), we say one sentence and end with 64, as all
//! programs of this project do. Any other difference begins with our exit code and gives its reason.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Stdio},
};

use common::{Bundle, possible};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use serde_json::Value;

/// How long a signal may take.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
const RUNC: &str = "/usr/sbin/runc";

/// One runtime with a container of its own.
struct Side {
    program: &'static str,
    bundle: Bundle,
}

#[derive(Debug)]
struct Answer {
    code: Option<i32>,
    out: String,
    err: String,
    state: String,
}

impl Side {
    fn new(program: &'static str, state: &str) -> Self {
        let bundle = Bundle::new(&["sleep", "1000"]);
        bundle.write();
        let side = Self { program, bundle };
        let steps: &[&str] = match state {
            "none" => &[],
            "created" => &["create ID"],
            "running" => &["run -d ID"],
            "paused" => &["run -d ID", "pause ID"],
            "stopped" => &["create ID", "kill ID KILL"],
            other => panic!("{other}"),
        };
        for step in steps {
            let done = side.call(step, "");
            assert_eq!(done.code, Some(0), "{program} {step}: {}", done.err);
        }
        if state == "stopped" {
            let status = || side.state();
            common::eventually("stopped", || (status() == "stopped").then_some(()), status);
        }
        side
    }

    fn call(&self, line: &str, input: &str) -> Answer {
        let dir = self.bundle.dir.path();
        let file =
            |name: &str| fs::File::options().create(true).write(true).truncate(true).open(dir.join(name)).unwrap();
        let words = words(line).into_iter().map(|word| {
            let word = if word == "ID" { self.bundle.id.clone() } else { word };
            word.replace("DIR", &dir.to_string_lossy())
        });
        // Files, not pipes: a container keeps its creator's streams.
        let mut child = Command::new(self.program)
            .arg("--root")
            .arg(dir.join("state"))
            .args(words)
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(file("out"))
            .stderr(file("err"))
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let code = child.wait().unwrap().code();
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
        Answer { code, out: read("out"), err: read("err"), state: String::new() }
    }

    fn state(&self) -> String {
        let state = serde_json::from_str::<Value>(&self.call("state ID", "").out).unwrap_or_default();
        state["status"].as_str().unwrap_or("none").to_owned()
    }

    /// Waits a while for the end of the container's process.
    fn await_end(&self) {
        let state = serde_json::from_str::<Value>(&self.call("state ID", "").out).unwrap_or_default();
        let pid = state["pid"].as_i64().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(Ok(pidfd)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&PATIENCE)).unwrap();
        }
    }

    fn answer(&self, line: &str) -> Answer {
        let (line, input) = line.split_once("<<").unwrap_or((line, ""));
        let answer = self.call(line, input);
        Answer { state: self.state(), ..answer }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.call("delete --force ID", "");
    }
}

/// The words of a line, with 'single quotes'.
fn words(line: &str) -> Vec<String> {
    let pieces = line.split('\'').enumerate();
    let split = |(at, piece): (usize, &str)| -> Vec<String> {
        if at % 2 == 1 { vec![piece.to_owned()] } else { piece.split_whitespace().map(str::to_owned).collect() }
    };
    pieces.flat_map(split).collect()
}

/// Whether ours has every key of theirs; what our groups have no controller for is empty.
fn lacks(theirs: &Value, ours: &Value, at: &str) -> Option<String> {
    match (theirs, ours) {
        (Value::Object(theirs), Value::Object(ours)) if !ours.is_empty() => theirs.iter().find_map(|(key, value)| {
            let at = format!("{at}/{key}");
            match ours.get(key) {
                // Without the inheritable set it has no effect; newer runc leaves it out as well.
                None if key == "ambient" => None,
                None => Some(at),
                Some(_) if ["raw", "annotations"].contains(&key.as_str()) => None,
                Some(own) => lacks(value, own, &at),
            }
        }),
        (Value::Array(theirs), Value::Array(ours)) => lacks(theirs.first()?, ours.first()?, &format!("{at}/0")),
        (Value::Object(_), Value::Object(_)) => None,
        (Value::Object(_), other) | (other, Value::Object(_)) => Some(format!("{at}: {other}")),
        _ => None,
    }
}

/// How what was printed differs in shape.
fn reshaped(theirs: &str, ours: &str) -> Option<String> {
    match (serde_json::from_str::<Value>(theirs), serde_json::from_str::<Value>(ours)) {
        (Ok(theirs), Ok(ours)) => lacks(&theirs, &ours, ""),
        (Err(_), Err(_)) => {
            let heading = |text: &str| {
                text.lines().next().unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
            };
            let (theirs, ours) = (heading(theirs), heading(ours));
            let titles = theirs.iter().any(|word| word == "PID" || word == "ID");
            (theirs.is_empty() != ours.is_empty() || titles && theirs != ours).then(|| format!("{theirs:?} {ours:?}"))
        }
        _ => Some("only one is JSON".into()),
    }
}

fn compare(theirs: &Side, ours: &Side, row: &str) -> Option<String> {
    let mut columns = row.split('|').map(str::trim);
    let (line, said) = (columns.next().unwrap_or_default(), columns.next().unwrap_or_default());
    let difference = columns.next().unwrap_or_default();
    let (mut runc, mut own) = (theirs.answer(line), ours.answer(line));
    // A signal needs a moment.
    if runc.state != own.state {
        theirs.await_end();
        ours.await_end();
        (runc.state, own.state) = (theirs.state(), ours.state());
    }
    let mut wrong = vec![];
    let code = match difference.split_once(": ") {
        Some((code, _reason)) => code.parse().ok(),
        None if difference == "usage" => Some(64),
        None => runc.code,
    };
    if own.code != code {
        wrong.push(format!("exit code {:?}, runc's is {:?}", own.code, runc.code));
    }
    if !difference.is_empty() && runc.code == own.code {
        wrong.push("there is no difference any more".into());
    }
    if own.state != runc.state {
        wrong.push(format!("{} afterwards, runc's is {}", own.state, runc.state));
    }
    if difference.is_empty() {
        wrong.extend(reshaped(&runc.out, &own.out));
    }
    for side in [&runc, &own] {
        let text = format!("{}{}", side.out, side.err).to_lowercase();
        wrong.extend(
            said.split_whitespace().find(|word| !text.contains(&word.to_lowercase())).map(|w| format!("no {w:?}")),
        );
    }
    (!wrong.is_empty()).then(|| format!("{line}: {wrong:?}\n  runc {runc:?}\n  ours {own:?}"))
}

/// Whether there is a runc to compare with. In the virtual machine, where v2 is all there is, each call takes seconds.
fn comparable() -> bool {
    possible() && Path::new(RUNC).exists() && !common::unified()
}

/// Compares all rows of a table, with one container for all or one for each.
fn table(state: &str, fresh: bool, rows: &str) {
    if !comparable() {
        return;
    }
    let both = || (Side::new(RUNC, state), Side::new(common::RUNTIME, state));
    let mut sides = both();
    let mut wrong = vec![];
    for (at, row) in rows.lines().map(str::trim).filter(|row| !row.is_empty()).enumerate() {
        if fresh && at > 0 {
            sides = both();
        }
        wrong.extend(compare(&sides.0, &sides.1, row));
    }
    assert!(wrong.is_empty(), "{state}:\n{}", wrong.join("\n"));
}

#[test]
fn without_a_container() {
    table("none", false, CALLS_WITHOUT);
    table("none", true, MAKING);
}

const CALLS_WITHOUT: &str = "
    --help
    --version
    nosuch                                     | nosuch          | usage
    --nosuch list                              | nosuch          | usage
    list --help
    exec --help
    create                                     |                 | usage
    create ID extra                            |                 | usage
    create --nosuch ID                         | nosuch          | usage
    create --bundle /nonexistent ID            | /nonexistent
    create bad/id                              | invalid container id
    create ''                                  |
    run --bundle /nonexistent ID               | /nonexistent
    run --console-socket DIR/nosuch -d ID      | console
    create --console-socket DIR/nosuch ID      | console
    run --preserve-fds x ID                    | x               | usage
    start ID                                   | does not exist
    start                                      |                 | usage
    state ID                                   | does not exist
    state                                      |                 | usage
    kill ID                                    | does not exist
    kill                                       |                 | usage
    delete ID                                  | does not exist
    delete                                     |                 | usage
    delete --force ID
    exec ID true                               | does not exist
    ps ID                                      | does not exist
    ps                                         |                 | usage
    pause ID                                   | does not exist
    pause                                      |                 | usage
    resume ID                                  | does not exist
    events --stats ID                          | does not exist
    events                                     |                 | usage
    update ID                                  | does not exist
    update                                     |                 | usage
    list
    list -q
    list -f json
    list extra                                 |                 | usage
    features
    features extra                             |                 | usage
    spec --bundle /nonexistent                 | /nonexistent
    spec --nosuch                              | nosuch          | usage
    spec --bundle DIR                          | config.json
    --debug list
    --log DIR/log --log-format text list
    --log-format yaml list                     | yaml            | usage
    --log /nonexistent/log list                | /nonexistent/log
    --rootless true list
    --criu /usr/sbin/criu list
    checkpoint ID                              |
    restore ID                                 |
";

const MAKING: &str = "
    create ID
    create --no-pivot --no-new-keyring --preserve-fds 0 ID
    create --pid-file DIR/pid ID
    create --pid-file /nonexistent/pid ID      | /nonexistent/ no such file
    create --preserve-fds 1000 ID              | preserve
    run -d ID
    run --no-pivot --detach ID
    run --no-new-keyring --no-subreaper --keep -d ID
    run --pid-file DIR/pid -b DIR -d ID
";

#[test]
fn a_running_container() {
    table("running", false, RUNNING);
    table("running", true, ENDING);
}

const RUNNING: &str = "
    create ID                                  | exists
    run -d ID                                  | exists
    start ID                                   | running
    state ID
    state ID extra                             |                 | usage
    kill ID 0
    kill ID NOSIG                              | signal nosig
    kill ID -5                                 | signal
    kill ID KILL extra                         |                 | usage
    kill --nosuch ID                           | nosuch          | usage
    delete ID                                  | not stopped
    delete ID extra                            |                 | usage
    list
    list -q
    list --quiet
    list -f json
    list --format table
    list -f yaml                               | invalid format option | 64: a word that is none of the option's is a usage error
    ps ID
    ps -f json ID
    ps --format table ID
    ps ID -o pid,comm
    ps ID aux
    ps ID -o comm                              | pid
    ps -f yaml ID                              | invalid format option | 64: a word that is none of the option's is a usage error
    events --stats ID
    events --stats --interval 1m30s ID
    events --stats --interval 0s ID            |
    events --stats --interval 1x ID            | 1x              | usage
    resume ID                                  |
    update ID
    update --memory 64m ID
    update --memory 67108864 --memory-swap -1 ID
    update --memory -1 ID
    update --memory x ID                       | x               | usage
    update --memory-reservation 1g ID
    update --cpu-share 512 ID
    update --cpu-quota 20000 --cpu-period 100000 ID
    update --cpu-quota x ID                    | x               | usage
    update --cpu-period -1 ID                  | -1              | usage
    update --cpu-rt-period 1000000 --cpu-rt-runtime 0 ID
    update --cpuset-cpus 0 --cpuset-mems 0 ID
    update --cpuset-cpus 99 ID                 | cpuset.cpus
    update --cpuset-cpus x ID                  |
    update --pids-limit 50 ID
    update --pids-limit -1 ID
    update --pids-limit x ID                   | x               | usage
    update --blkio-weight 5 ID                 |
    update --kernel-memory 1000000 ID          | kernel memory
    update --kernel-memory-tcp 1000000 ID      | kernel memory
    update --l3-cache-schema L3:0=f ID         | rdt
    update --mem-bw-schema MB:0=10 ID          | rdt
    update --cpu-idle 0 ID                     |                 | 0: newer runc has it
    update --cpu-burst 0 ID                    |                 | 0: newer runc has it
    update --nosuch ID                         | nosuch          | usage
    update -r /nonexistent ID                  | /nonexistent
    update -r - ID<<{\"memory\":{\"limit\":67108864}}
    update --resources - ID<<{\"pids\":{\"limit\":20}}
    update -r - ID<<{\"nosuch\":1}
    update -r - ID<<garbage                    |
";

const ENDING: &str = "
    kill ID
    kill ID KILL
    kill ID SIGKILL
    kill ID sigkill
    kill ID 9
    kill ID 99                                 |
    kill --all ID KILL
    kill -a ID KILL
    delete --force ID
    delete -f ID
    pause ID
";

#[test]
fn executing() {
    table("running", false, EXECUTING);
    table("created", false, "exec ID true");
}

const EXECUTING: &str = "
    exec                                       |                 | usage
    exec ID                                    | args empty
    exec ID true
    exec ID false
    exec ID sh -c 'exit 42'
    exec ID nosuch                             | nosuch executable file not found in $PATH | 127: tells that there is no such program from any exit code of one
    exec ID /bin                               | exec: /bin      | 126: tells that it cannot be run from any exit code of one
    exec -e A=b ID sh -c 'echo $A'
    exec --env A=b --cwd /bin ID sh -c 'echo $A $PWD'
    exec --cwd bin ID true                     | cwd absolute
    exec --cwd /nosuch ID true                 | /nosuch no such file or directory
    exec -u 5:6 ID id
    exec --user 5 ID id
    exec -u nosuch ID id                       | nosuch
    exec -u root ID id                         |                 | 0: names are looked up in the container, as crun does
    exec -g 7 -g 8 ID id
    exec --additional-gids 7 ID id
    exec -g x ID id                            | x               | usage
    exec --cap CAP_MKNOD ID true
    exec -c CAP_NOSUCH ID true                 | cap_nosuch unknown
    exec --no-new-privs ID true
    exec -d ID sleep 1
    exec --detach --pid-file DIR/pid ID true
    exec -t -d ID true                         | console socket
    exec -p /nonexistent ID                    | /nonexistent no such file
    exec --preserve-fds x ID true              | x               | usage
    exec --preserve-fds 1000 ID true           | preserve
    exec --cgroup / ID true
    exec --cgroup nosuch ID true               | nosuch no such file or directory
    exec --cgroup ../x ID true                 | ../x
    exec --cgroup memory:/ ID true             |                 | 255: one path for all controllers
    exec --apparmor nosuch ID true             | apparmor profile
    exec --process-label a:b:c:d ID true       | selinux
    exec --ignore-paused ID true
    exec --nosuch ID true                      | nosuch          | usage
";

#[test]
fn other_states() {
    table(
        "created",
        false,
        "
        state ID
        list
        ps ID
        events --stats ID
        update --memory 64m ID
        resume ID                              |
        start ID extra                         |                 | usage
    ",
    );
    table(
        "created",
        true,
        "
        start ID
        kill ID KILL
        delete ID
        pause ID
    ",
    );
    table(
        "paused",
        false,
        "
        state ID
        ps ID
        events --stats ID
        start ID                               | start paused
        pause ID                               |
        update --memory 64m ID
        exec ID true                           | cannot exec in a paused container
        exec --nosuch ID true                  |                 | usage
        delete ID                              | paused
    ",
    );
    table(
        "paused",
        true,
        "
        resume ID
        kill ID KILL
        delete -f ID
    ",
    );
    table(
        "stopped",
        false,
        "
        state ID
        list
        start ID                               | stopped
        kill ID                                | not running
        kill ID 0                              | not running
        kill --all ID
        exec ID true                           | cannot exec in a stopped container
        pause ID                               |
        resume ID                              |
        events --stats ID                      | not running
        update --memory 64m ID                 |
        ps ID
        delete ID
    ",
    );
}

/// `spec`, `--log` and the console socket leave more than an answer.
#[test]
fn files_and_sockets() {
    if !comparable() {
        return;
    }
    let read = |side: &Side, line: &str, file: &str| -> Value {
        let answer = side.call(line, "");
        let text = fs::read_to_string(side.bundle.dir.path().join(file)).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {line}: {e} {answer:?}", side.program))
    };
    let (runc, ours) = (Side::new(RUNC, "none"), Side::new(common::RUNTIME, "none"));
    for (line, file) in [
        ("--log DIR/log --log-format json state nosuch", "log"),
        ("spec --bundle DIR/root", "root/config.json"),
        ("spec -b DIR/user --rootless", "user/config.json"),
    ] {
        for side in [&runc, &ours] {
            for dir in ["root", "user"] {
                fs::create_dir_all(side.bundle.dir.path().join(dir)).unwrap();
            }
        }
        assert_eq!(lacks(&read(&runc, line, file), &read(&ours, line, file), ""), None, "{line}");
    }
    drop((runc, ours));
    for program in [RUNC, common::RUNTIME] {
        let side = Side::new(program, "running");
        let listener = UnixListener::bind(side.bundle.dir.path().join("console")).unwrap();
        let process =
            serde_json::json!({"args": ["/bin/tty"], "cwd": "/", "terminal": true, "user": {"uid": 0, "gid": 0}});
        fs::write(side.bundle.dir.path().join("process.json"), process.to_string()).unwrap();
        for line in [
            "exec -t -d --console-socket DIR/console ID tty",
            "exec -d --console-socket DIR/console -p DIR/process.json ID",
        ] {
            let answer = side.call(line, "");
            assert_eq!(answer.code, Some(0), "{program} {line}: {}", answer.err);
            // The name of the terminal comes with its descriptor.
            let mut name = [0; 64];
            let n = listener.accept().unwrap().0.read(&mut name).unwrap();
            assert!(n > 0, "{program} {line}");
        }
    }
}
