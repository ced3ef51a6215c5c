//! /logs: the files below /var/log, and logs of the node's services by name (node log query).
//!
//! Files are opened beneath the directory: a link that leads out of it (a container with a hostPath there can make one)
//! is not followed.

use std::{
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
};

use http::StatusCode;
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags};

/// Services, files and time asked for at most.
const MOST: usize = 20;

/// An answer: status, content type, content.
pub(super) type Answer = (StatusCode, &'static str, Vec<u8>);

const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";

fn say(status: StatusCode, text: impl Into<String>) -> Answer {
    (status, TEXT, format!("{}\n", text.into()).into_bytes())
}

/// What a query asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wish {
    services: Vec<String>,
    file: Option<String>,
    since: Option<String>,
    until: Option<String>,
    tail: Option<u32>,
    pattern: Option<String>,
    boot: Option<i32>,
}

impl Wish {
    fn options(&self) -> bool {
        self.since.is_some() || self.until.is_some() || self.pattern.is_some() || self.boot.is_some()
    }
}

/// Reads the query; `None` when nothing is asked for by name.
fn parse(query: &[(String, String)]) -> Result<Option<Wish>, String> {
    let mut wish = Wish::default();
    let time = |name: &str, v: &str| {
        v.parse::<jiff::Timestamp>().map_err(|_| format!("{name}: Invalid value: {v:?}: must be an RFC3339 time"))
    };
    for (name, v) in query.iter().filter(|(_, v)| !v.is_empty()) {
        match name.as_str() {
            "query" if v.contains(['/', '\\']) => {
                let second = wish.file.replace(v.clone()).is_some();
                second.then_some(()).map_or(Ok(()), |()| Err("query: only one file can be asked for"))?;
            }
            "query" => {
                let fine = v.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:@".contains(c)) && !v.starts_with('-');
                if !fine {
                    return Err(format!("query: Invalid value: {v:?}: not the name of a service"));
                }
                wish.services.push(v.clone());
            }
            "sinceTime" => wish.since = Some(time(name, v)?.to_string()),
            "untilTime" => wish.until = Some(time(name, v)?.to_string()),
            "tailLines" => {
                let lines = v.parse().map_err(|_| format!("tailLines: Invalid value: {v:?}: must be a number"))?;
                wish.tail = Some(lines);
            }
            "pattern" => wish.pattern = Some(v.clone()),
            "boot" => {
                let boot: i32 = v.parse().map_err(|_| format!("boot: Invalid value: {v:?}: must be a number"))?;
                if boot > 0 {
                    return Err(format!("boot: Invalid value: {boot}: must be less than or equal to zero"));
                }
                wish.boot = Some(boot);
            }
            _ => {}
        }
    }
    if wish.services.len() > MOST {
        return Err(format!("query: more than {MOST} services"));
    }
    if wish.file.is_some() && !wish.services.is_empty() {
        return Err("query: cannot specify a file and a service at the same time".into());
    }
    if wish.file.is_some() && wish.options() {
        return Err("query: file and options other than tailLines cannot be given at the same time".into());
    }
    Ok((wish.file.is_some() || !wish.services.is_empty()).then_some(wish))
}

/// Answers for `path` (cut up) below `root`; `by_name` allows queries.
pub(super) async fn answer(root: PathBuf, path: &[&str], query: &[(String, String)], by_name: bool) -> Answer {
    let wish = if by_name { parse(query) } else { Ok(None) };
    let relative = match wish {
        Err(error) => return say(StatusCode::NOT_ACCEPTABLE, error),
        Ok(Some(_)) if !path.is_empty() => return say(StatusCode::NOT_ACCEPTABLE, "path not allowed in query mode"),
        Ok(Some(wish)) => match wish.file.clone() {
            Some(file) => {
                let relative = file.replace('\\', "/").trim_start_matches('/').to_string();
                return read(root, relative, wish.tail).await;
            }
            None => return services(&root, &wish).await,
        },
        Ok(None) => path.join("/"),
    };
    read(root, relative, None).await
}

async fn read(root: PathBuf, relative: String, tail: Option<u32>) -> Answer {
    let work = move || match open(&root, &relative) {
        Ok((fd, FileType::Directory)) => listing(&fd),
        Ok((fd, FileType::RegularFile)) => {
            let mut content = Vec::new();
            match std::fs::File::from(fd).read_to_end(&mut content) {
                Ok(_) => (StatusCode::OK, TEXT, last_lines(content, tail)),
                Err(e) => say(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
            }
        }
        Ok(_) => say(StatusCode::FORBIDDEN, "403 not a regular file"),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => say(StatusCode::NOT_FOUND, "404 page not found"),
        Err(e) => say(StatusCode::FORBIDDEN, format!("403 {relative:?} cannot be opened below the log directory: {e}")),
    };
    // A log file may be large and the disk slow.
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| say(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()))
}

fn open(root: &Path, relative: &str) -> rustix::io::Result<(OwnedFd, FileType)> {
    let dir = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let name = if relative.is_empty() { "." } else { relative };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    // Opening a pipe for reading would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::openat2(dir.as_fd(), name, flags, Mode::empty(), resolve)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
    Ok((fd, kind))
}

/// As Go's file server shows a directory.
fn listing(fd: &OwnedFd) -> Answer {
    let mut names: Vec<String> = Dir::read_from(fd)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            let name = e.file_name().to_str().ok()?.to_string();
            let dir = if e.file_type() == FileType::Directory { "/" } else { "" };
            (name != "." && name != "..").then(|| format!("{name}{dir}"))
        })
        .collect();
    names.sort();
    let escape = |t: &str| t.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;");
    let rows: String =
        names.iter().map(|n| format!("<a href=\"{}\">{}</a>\n", escape(&n.replace(' ', "%20")), escape(n))).collect();
    let page =
        format!("<!doctype html>\n<meta name=\"viewport\" content=\"width=device-width\">\n<pre>\n{rows}</pre>\n");
    (StatusCode::OK, HTML, page.into_bytes())
}

fn last_lines(content: Vec<u8>, tail: Option<u32>) -> Vec<u8> {
    let Some(lines) = tail.map(|t| t as usize) else { return content };
    let end = content.len() - usize::from(content.ends_with(b"\n"));
    let starts = content[..end].iter().enumerate().rev().filter(|(_, b)| **b == b'\n').map(|(at, _)| at + 1);
    match lines {
        0 => Vec::new(),
        n => starts.clone().nth(n - 1).map_or(content.clone(), |at| content[at..].to_vec()),
    }
}

/// From the journal where there is one, else from the files such services write.
async fn services(root: &Path, wish: &Wish) -> Answer {
    if Path::new("/run/systemd/journal").is_dir() {
        return journal(wish).await;
    }
    if wish.options() {
        return say(
            StatusCode::BAD_REQUEST,
            "options other than tailLines need the journal, which this node does not have",
        );
    }
    let mut all = Vec::new();
    for service in &wish.services {
        let places = [
            format!("{service}.log"),
            format!("{service}/{service}.log"),
            format!("{service}/agent.log"),
            service.clone(),
        ];
        let mut found = None;
        for place in places {
            let answer = read(root.to_path_buf(), place, wish.tail).await;
            if answer.0 == StatusCode::OK && answer.1 == TEXT {
                found = Some(answer.2);
                break;
            }
        }
        match found {
            Some(content) => all.extend(content),
            None => return say(StatusCode::NOT_FOUND, format!("logs not found for {service}")),
        }
    }
    (StatusCode::OK, TEXT, all)
}

/// The words for journalctl.
fn arguments(wish: &Wish) -> Vec<String> {
    let mut all: Vec<String> = ["--utc", "--no-pager", "--output=short-precise"].map(Into::into).into();
    for (option, value) in [("since", &wish.since), ("until", &wish.until)] {
        if let Some(v) = value {
            let plain = v.trim_end_matches('Z').replace('T', " ");
            let whole = plain.split('.').next().unwrap_or(&plain);
            all.push(format!("--{option}={whole} UTC"));
        }
    }
    all.extend(wish.tail.map(|t| format!("--lines={t}")));
    all.extend(wish.pattern.as_ref().map(|p| format!("--grep={p}")));
    all.extend(wish.boot.map(|b| format!("--boot={b}")));
    all.extend(wish.services.iter().map(|s| format!("--unit={s}")));
    all
}

async fn journal(wish: &Wish) -> Answer {
    let mut command = tokio::process::Command::new("journalctl");
    command.args(arguments(wish)).stdin(Stdio::null()).kill_on_drop(true);
    let limit = std::time::Duration::from_secs(30);
    match tokio::time::timeout(limit, command.output()).await {
        Err(_) => say(StatusCode::INTERNAL_SERVER_ERROR, "journalctl takes too long"),
        Ok(Err(e)) => say(StatusCode::INTERNAL_SERVER_ERROR, format!("journalctl: {e}")),
        Ok(Ok(out)) if out.status.success() => (StatusCode::OK, TEXT, out.stdout),
        Ok(Ok(out)) => say(StatusCode::INTERNAL_SERVER_ERROR, String::from_utf8_lossy(&out.stderr).trim().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &str) -> Vec<(String, String)> {
        text.split('&').filter_map(|p| p.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    }

    #[tokio::test]
    async fn files_are_read_below_the_directory_only() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("log");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::write(dir.path().join("secret"), "s").unwrap();
        std::fs::write(root.join("a.log"), "1\n2\n3\n").unwrap();
        std::fs::write(root.join("sub/sub.log"), "x\ny\n").unwrap();
        std::os::unix::fs::symlink("../secret", root.join("out")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("abs")).unwrap();
        let of = |path: &'static str, q: &'static str, by_name: bool| {
            let root = root.clone();
            async move {
                let path: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
                let (status, _, body) = answer(root, &path, &query(q), by_name).await;
                (status.as_u16(), String::from_utf8(body).unwrap())
            }
        };
        assert_eq!(of("a.log", "", false).await, (200, "1\n2\n3\n".into()));
        let (status, page) = of("", "", false).await;
        assert!(status == 200 && page.contains("<a href=\"a.log\">a.log</a>") && page.contains("sub/"), "{page}");
        assert_eq!(of("out", "", false).await.0, 403);
        assert_eq!(of("abs", "", false).await.0, 403);
        assert_eq!(of("../secret", "", false).await.0, 403);
        assert_eq!(of("none", "", false).await.0, 404);
        assert_eq!(of("", "query=/a.log&tailLines=2", true).await, (200, "2\n3\n".into()));
        assert_eq!(of("a.log", "query=sub", true).await.0, 406);
        assert_eq!(of("", "query=-rf", true).await.0, 406);
        assert_eq!(of("", "query=/a.log&pattern=x", true).await.0, 406);
        if !Path::new("/run/systemd/journal").is_dir() {
            assert_eq!(of("", "query=sub", true).await, (200, "x\ny\n".into()));
            assert_eq!(of("", "query=none", true).await.0, 404);
            assert_eq!(of("", "query=sub&pattern=x", true).await.0, 400);
        }
    }

    #[test]
    fn the_journal_is_asked_in_its_words() {
        let wish =
            parse(&query("query=isopod&sinceTime=2026-01-02T03:04:05Z&tailLines=5&pattern=err&boot=-1")).unwrap();
        assert_eq!(
            arguments(&wish.unwrap()).join(" "),
            "--utc --no-pager --output=short-precise --since=2026-01-02 03:04:05 UTC --lines=5 --grep=err --boot=-1 \
             --unit=isopod"
        );
        assert!(parse(&query("query=a&boot=1")).is_err());
        assert!(parse(&query("query=a&query=/b")).is_err());
        assert_eq!(parse(&query("")).unwrap(), None);
    }
}
