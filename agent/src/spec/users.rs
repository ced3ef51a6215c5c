//! Users and groups of an image, read from its layers by our own parser (no NSS anywhere).

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::PathBuf,
};

/// One line of /etc/passwd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Passwd {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: String,
}

/// One line of /etc/group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) gid: u32,
    pub(crate) members: Vec<String>,
}

/// An image's user and group files.
#[derive(Debug, Clone, Default)]
pub(crate) struct Users {
    passwd: Vec<Passwd>,
    groups: Vec<Group>,
}

/// Who a container runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Groups the image gives the user besides.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: Option<String>,
}

impl Users {
    /// Reads the files from overlay layers, uppermost first.
    pub(crate) fn of_layers(layers: &[PathBuf]) -> Self {
        Self::parse(&read(layers, "passwd"), &read(layers, "group"))
    }

    /// Parses the files' texts; lines that are none are skipped.
    pub(crate) fn parse(passwd: &str, group: &str) -> Self {
        let passwd = passwd.lines().filter_map(|l| {
            let f: Vec<&str> = l.split(':').collect();
            let home = f.get(5).unwrap_or(&"").to_string();
            Some(Passwd { name: f[0].into(), uid: f.get(2)?.parse().ok()?, gid: f.get(3)?.parse().ok()?, home })
        });
        let groups = group.lines().filter_map(|l| {
            let f: Vec<&str> = l.split(':').collect();
            let members = f.get(3).unwrap_or(&"").split(',').filter(|m| !m.is_empty()).map(Into::into).collect();
            Some(Group { name: f[0].into(), gid: f.get(2)?.parse().ok()?, members })
        });
        Self { passwd: passwd.collect(), groups: groups.collect() }
    }

    /// Resolves `USER[:GROUP]` of an image (names or numbers; empty is root).
    pub(crate) fn resolve(&self, user: &str) -> Result<Identity, String> {
        let (user, group) = match user.split_once(':') {
            Some((u, g)) => (u, Some(g).filter(|g| !g.is_empty())),
            None => (user, None),
        };
        let entry = match user.parse::<u32>() {
            Ok(uid) => self.passwd.iter().find(|p| p.uid == uid),
            Err(_) if user.is_empty() => self.passwd.iter().find(|p| p.uid == 0),
            Err(_) => Some(
                self.passwd
                    .iter()
                    .find(|p| p.name == user)
                    .ok_or_else(|| format!("unable to find user {user}: no matching entries in passwd file"))?,
            ),
        };
        let uid = entry.map_or_else(|| user.parse().unwrap_or(0), |p| p.uid);
        let mut identity = self.of_uid(uid, entry);
        if let Some(group) = group {
            identity.gid = match group.parse() {
                Ok(gid) => gid,
                Err(_) => {
                    let found = self.groups.iter().find(|g| g.name == group);
                    found.ok_or_else(|| format!("unable to find group {group}: no matching entries in group file"))?.gid
                }
            };
        }
        Ok(identity)
    }

    /// The identity of a number given by the pod.
    pub(crate) fn resolve_uid(&self, uid: u32) -> Identity {
        self.of_uid(uid, self.passwd.iter().find(|p| p.uid == uid))
    }

    fn of_uid(&self, uid: u32, entry: Option<&Passwd>) -> Identity {
        let groups = entry.map_or_else(Vec::new, |p| {
            let member = self.groups.iter().filter(|g| g.members.contains(&p.name));
            member.map(|g| g.gid).collect()
        });
        Identity { uid, gid: entry.map_or(0, |p| p.gid), groups, home: entry.map(|p| p.home.clone()) }
    }
}

/// `etc/NAME` as the stacked layers show it; empty when it is not there. Links are not followed.
fn read(layers: &[PathBuf], name: &str) -> String {
    for layer in layers {
        let etc = layer.join("etc");
        let path = etc.join(name);
        if let Ok(meta) = fs::symlink_metadata(&path) {
            let whiteout = meta.file_type().is_char_device() && meta.rdev() == 0;
            return if meta.is_file() && !whiteout && meta.len() < 8 << 20 {
                fs::read_to_string(&path).unwrap_or_default()
            } else {
                String::new()
            };
        }
        let mut value = [0u8; 2];
        for attribute in ["trusted.overlay.opaque", "user.overlay.opaque"] {
            if rustix::fs::lgetxattr(&etc, attribute, &mut value[..]).is_ok_and(|n| n == 1 && value[0] == b'y') {
                return String::new();
            }
        }
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users() -> Users {
        Users::parse(
            "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:/bin/false\nbroken\n",
            "root:x:0:\nwww:x:34:\nextra:x:50:web,root\n",
        )
    }

    #[test]
    fn names_and_numbers() {
        let u = users();
        let of = |s: &str| u.resolve(s).map(|i| (i.uid, i.gid, i.groups));
        assert_eq!(of(""), Ok((0, 0, vec![50])));
        assert_eq!(of("web"), Ok((33, 34, vec![50])));
        assert_eq!(of("33"), Ok((33, 34, vec![50])));
        assert_eq!(of("web:0"), Ok((33, 0, vec![50])));
        assert_eq!(of("1000:www"), Ok((1000, 34, vec![])));
        assert_eq!(of("1000"), Ok((1000, 0, vec![])));
        assert!(of("nobody").unwrap_err().contains("no matching entries in passwd file"));
        assert!(of("web:nogroup").unwrap_err().contains("group file"));
    }

    #[test]
    fn the_uppermost_layer_wins() {
        let dir = tempfile::tempdir().unwrap();
        let (top, bottom) = (dir.path().join("top"), dir.path().join("bottom"));
        for (l, text) in [(&top, "a:x:1:1::/:\n"), (&bottom, "b:x:2:2::/:\n")] {
            fs::create_dir_all(l.join("etc")).unwrap();
            fs::write(l.join("etc/passwd"), text).unwrap();
        }
        assert_eq!(read(&[top.clone(), bottom.clone()], "passwd"), "a:x:1:1::/:\n");
        fs::remove_file(top.join("etc/passwd")).unwrap();
        assert_eq!(read(&[top, bottom], "passwd"), "b:x:2:2::/:\n");
    }
}
