//! Which functions of `isopod` and `isopod-runtime` running processes enter, and those they start: what the linker puts next to
//! each other (`order.txt` of both crates, made by `make order`).
//!
//! `touched PID...` says `tracing` and then, until its input ends, `executable symbol` for every function in the order of the
//! first calls. Every function begins with a breakpoint that goes when it is hit, so that a process is soon as fast as ever.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::{
    libc,
    sys::{
        ptrace::{self, Options},
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

const BREAKPOINT: u8 = 0xcc;
/// The executables, by the names that /proc shows.
const PROGRAMS: [&str; 2] = ["isopod", "isopod-runtime"];

/// The code of an executable, which runs at the addresses in its file.
struct Program {
    name: &'static str,
    start: u64,
    code: Vec<u8>,
    broken: Vec<u8>,
    functions: HashMap<u64, String>,
}

impl Program {
    /// Reads the functions with readelf(1), and the code.
    fn read(name: &'static str, file: &PathBuf) -> Result<Self> {
        let output = |what: &str| -> Result<String> {
            let ran = Command::new("readelf").arg(what).arg(file).output().context("readelf")?;
            ensure!(ran.status.success(), "readelf: {}", String::from_utf8_lossy(&ran.stderr));
            Ok(String::from_utf8(ran.stdout)?)
        };
        let sections = output("-SW")?;
        let line = sections.lines().find(|line| line.contains(" .text ")).context("no .text")?;
        let fields: Vec<&str> = line.split("] ").nth(1).unwrap_or_default().split_whitespace().collect();
        let number = |at: usize| u64::from_str_radix(fields.get(at).copied().unwrap_or_default(), 16);
        let (start, offset, size) = (number(2)?, number(3)?, number(4)?);
        let mut code = vec![0; usize::try_from(size)?];
        File::open(file)?.read_exact_at(&mut code, offset)?;
        let mut functions = HashMap::new();
        for line in output("-sW")?.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, address, _, "FUNC", _, _, _, symbol] = fields[..] else { continue };
            let address = u64::from_str_radix(address, 16)?;
            if (start..start + size).contains(&address) {
                functions.entry(address).or_insert_with(|| symbol.to_owned());
            }
        }
        let mut broken = code.clone();
        for address in functions.keys() {
            broken[(address - start) as usize] = BREAKPOINT;
        }
        Ok(Self { name, start, code, broken, functions })
    }
}

/// What is traced, and what was found.
#[derive(Default)]
struct Tracer {
    programs: Vec<Program>,
    /// Traced threads, and the process of each.
    threads: HashMap<Pid, Pid>,
    ending: bool,
    seen: HashSet<(usize, u64)>,
}

fn memory(thread: Pid) -> std::io::Result<File> {
    File::options().read(true).write(true).open(format!("/proc/{thread}/mem"))
}

impl Tracer {
    /// The program a thread runs, when it is one of ours.
    fn program(&mut self, thread: Pid) -> Result<Option<usize>> {
        let link = format!("/proc/{thread}/exe");
        let Ok(exe) = fs::read_link(&link) else { return Ok(None) };
        let name = exe.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = name.trim_end_matches(" (deleted)");
        if let Some(at) = self.programs.iter().position(|program| program.name == name) {
            return Ok(Some(at));
        }
        let Some(name) = PROGRAMS.into_iter().find(|known| *known == name) else { return Ok(None) };
        self.programs.push(Program::read(name, &link.into())?);
        Ok(Some(self.programs.len() - 1))
    }

    /// Seizes every thread of a process and breaks its functions.
    fn attach(&mut self, process: Pid) -> Result<()> {
        let options = Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACEEXEC;
        for entry in fs::read_dir(format!("/proc/{process}/task"))? {
            let thread = Pid::from_raw(entry?.file_name().to_string_lossy().parse()?);
            ptrace::seize(thread, options).with_context(|| format!("seize {thread}"))?;
            ptrace::interrupt(thread)?;
            waitpid(thread, Some(WaitPidFlag::__WALL))?;
            self.threads.insert(thread, process);
        }
        self.plant(process)?;
        for (thread, _) in self.threads.iter().filter(|(_, of)| **of == process) {
            ptrace::cont(*thread, None)?;
        }
        Ok(())
    }

    fn plant(&mut self, process: Pid) -> Result<()> {
        if let Some(at) = self.program(process)? {
            let program = &self.programs[at];
            memory(process)?.write_all_at(&program.broken, program.start)?;
        }
        Ok(())
    }

    /// A thread stopped at a breakpoint of ours: notes the function and lets it run.
    fn hit(&mut self, thread: Pid) -> Result<bool> {
        let Some(at) = self.program(thread)? else { return Ok(false) };
        let mut registers = ptrace::getregs(thread)?;
        let address = registers.rip - 1;
        let program = &self.programs[at];
        let Some(symbol) = program.functions.get(&address) else { return Ok(false) };
        let offset = (address - program.start) as usize;
        memory(thread)?.write_all_at(&program.code[offset..=offset], address)?;
        registers.rip = address;
        ptrace::setregs(thread, registers)?;
        if self.seen.insert((at, address)) {
            println!("{} {symbol}", program.name);
        }
        Ok(true)
    }

    /// Takes one stop of a thread; what it is to go on with.
    fn stopped(&mut self, status: WaitStatus) -> Result<()> {
        let (thread, signal) = match status {
            WaitStatus::Stopped(thread, Signal::SIGTRAP) => {
                let signal = (!self.hit(thread)?).then_some(Signal::SIGTRAP);
                (thread, signal)
            }
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            WaitStatus::PtraceEvent(thread, _, libc::PTRACE_EVENT_EXEC) => {
                self.threads.insert(thread, thread);
                self.plant(thread)?;
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, ..) => {
                self.threads.entry(thread).or_insert(thread);
                (thread, None)
            }
            WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..) => {
                self.threads.remove(&thread);
                return Ok(());
            }
            _ => return Ok(()),
        };
        if self.ending && signal.is_none() { self.leave(thread) } else { Ok(ptrace::cont(thread, signal)?) }
    }

    /// Puts the code back and lets a stopped thread go.
    fn leave(&mut self, thread: Pid) -> Result<()> {
        if let Some(at) = self.program(thread)? {
            let program = &self.programs[at];
            memory(thread)?.write_all_at(&program.code, program.start)?;
        }
        self.threads.remove(&thread);
        Ok(ptrace::detach(thread, None)?)
    }

    /// Until `end`, a child of ours, is over.
    fn run(&mut self, end: Pid) -> Result<()> {
        while !self.threads.is_empty() {
            let status = waitpid(None, Some(WaitPidFlag::__WALL))?;
            if status.pid() == Some(end) {
                self.ending = true;
                for thread in self.threads.keys() {
                    let _ = ptrace::interrupt(*thread);
                }
                continue;
            }
            // A thread may be killed at any time.
            if let Err(error) = self.stopped(status) {
                eprintln!("touched: {status:?}: {error:#}");
            }
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let mut tracer = Tracer::default();
    for process in std::env::args().skip(1) {
        tracer.attach(Pid::from_raw(process.parse()?))?;
    }
    println!("tracing");
    let end = Command::new("cat").stdout(Stdio::null()).spawn()?;
    tracer.run(Pid::from_raw(end.id().cast_signed()))
}
