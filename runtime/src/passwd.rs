//! Users and groups by the container's own /etc/passwd and /etc/group, which may be hostile: any size, any bytes.

use std::{io::Read, path::Path};

use rustix::fs::{FileType, OFlags};

use crate::{
    error::{Context, Error, Result},
    root::Root,
};

/// Most bytes read of either file.
const MAX_SIZE: u64 = 4 << 20;

/// A user to run as.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Identity {
    /// User id.
    pub(crate) uid: u32,
    /// Primary group id.
    pub(crate) gid: u32,
    /// Groups that list the user.
    pub(crate) groups: Vec<u32>,
    /// Home directory.
    pub(crate) home: Option<String>,
}

/// Reads a file of the root as lines; an absent one is empty.
pub(crate) fn read(root: &Root, path: &str) -> Result<String> {
    // O_NONBLOCK: a fifo in its place must not hang us.
    let fd = match root.open(Path::new(path), OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
        Ok(fd) => fd,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(e) => return Err(Error::system(format!("open {path} in the container"), e)),
    };
    let stat = rustix::fs::fstat(&fd).context(|| format!("stat {path} in the container"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::invalid(format!("{path} in the container is no regular file")));
    }
    let mut bytes = vec![];
    std::fs::File::from(fd)
        .take(MAX_SIZE)
        .read_to_end(&mut bytes)
        .context(|| format!("read {path} in the container"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Resolves `user[:group]`, each a name or a number, as `--user` takes it.
pub(crate) fn resolve(user: &str, passwd: &str, group: &str) -> Result<Identity> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((u, g)) => (u, Some(g)),
        None => (user, None),
    };
    let number = user.parse::<u32>().ok();
    let entry = lines(passwd, 7)
        .find(|f| f[0] == user)
        .or_else(|| lines(passwd, 7).find(|f| number.is_some() && f[2].parse::<u32>().ok() == number));
    let mut identity = match (&entry, number) {
        (Some(fields), _) => Identity {
            uid: fields[2].parse().map_err(|_| Error::invalid(format!("user {user:?} has a malformed uid")))?,
            gid: fields[3].parse().map_err(|_| Error::invalid(format!("user {user:?} has a malformed gid")))?,
            groups: vec![],
            home: Some(fields[5].to_owned()),
        },
        (None, Some(uid)) => Identity { uid, ..Identity::default() },
        (None, None) => {
            return Err(Error::invalid(format!("unable to find user {user}: no matching entries in passwd file")));
        }
    };
    if let Some(wanted) = wanted_group.filter(|g| !g.is_empty()) {
        let known = lines(group, 4).find(|f| f[0] == wanted).and_then(|f| f[2].parse().ok());
        identity.gid = match known.or_else(|| wanted.parse().ok()) {
            Some(gid) => gid,
            None => {
                return Err(Error::invalid(format!(
                    "unable to find group {wanted}: no matching entries in group file"
                )));
            }
        };
    } else if let Some(fields) = &entry {
        let name = fields[0];
        identity.groups = lines(group, 4)
            .filter(|f| f[3].split(',').any(|member| member.trim() == name))
            .filter_map(|f| f[2].parse().ok())
            .collect();
    }
    Ok(identity)
}

/// The home directory of a uid.
pub(crate) fn home_of(uid: u32, passwd: &str) -> Option<String> {
    lines(passwd, 7).find(|f| f[2].parse::<u32>().ok() == Some(uid)).map(|f| f[5].to_owned()).filter(|h| !h.is_empty())
}

fn lines(text: &str, fields: usize) -> impl Iterator<Item = Vec<&str>> {
    text.lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(move |l| l.splitn(fields, ':').collect::<Vec<_>>())
        .filter(move |f: &Vec<&str>| f.len() == fields && !f[0].is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# no\n\nbroken:x:1\nweb:x:33:33:www:/var/www:/bin/false\nbig:x:99999999999:1::/:/\n";
    const GROUP: &str = "root:x:0:\nwww:x:33:\naudio:x:63:web,root\nvideo:x:44: web\n";

    #[test]
    fn names_numbers_and_groups() {
        let web = resolve("web", PASSWD, GROUP).unwrap();
        assert_eq!((web.uid, web.gid, web.groups.as_slice()), (33, 33, &[63, 44][..]));
        assert_eq!(web.home.as_deref(), Some("/var/www"));
        assert_eq!(resolve("33", PASSWD, GROUP).unwrap(), web);
        let other = resolve("web:audio", PASSWD, GROUP).unwrap();
        assert_eq!((other.gid, other.groups.len()), (63, 0));
        let unknown = resolve("1234:5678", PASSWD, GROUP).unwrap();
        assert_eq!((unknown.uid, unknown.gid), (1234, 5678));
    }

    #[test]
    fn hostile_entries_are_errors_or_skipped() {
        assert!(resolve("nobody", PASSWD, GROUP).is_err());
        assert!(resolve("broken", PASSWD, GROUP).is_err());
        assert!(resolve("big", PASSWD, GROUP).is_err());
        assert!(resolve("web:nogroup", PASSWD, GROUP).is_err());
        assert_eq!(home_of(0, PASSWD).as_deref(), Some("/root"));
        assert_eq!(home_of(7, PASSWD), None);
    }

    proptest::proptest! {
        #[test]
        fn never_panics(text in ".{0,200}", user in ".{0,20}") {
            let _ = resolve(&user, &text, &text);
            let _ = home_of(1, &text);
        }
    }
}
