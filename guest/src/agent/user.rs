//! Who a process runs as, by the container's own `/etc/passwd` and `/etc/group`.
//!
//! The grammar is Docker's: `name|uid[:group|gid]`. A name must be in the file; a number need
//! not be. Without a group the user's own is taken, with its supplementary groups; with an
//! explicit group there are none.

use super::syscall::{cstring, open_under, read};
use guest::protocol::{Failure, FailureKind};
use std::os::fd::AsFd;

/// Largest file read; larger ones are cut, as what follows cannot be a real user list.
const MAX_FILE: usize = 4 << 20;

/// Most supplementary groups (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65_536;

/// Who a process runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    /// Home directory, `/` when the files do not say.
    pub home: String,
}

/// Finds `user` and the extra `groups` in the files under the container's `root`.
pub fn resolve(root: &impl AsFd, user: &str, groups: &[String]) -> Result<Identity, Failure> {
    let passwd = file(root, "etc/passwd");
    let group = file(root, "etc/group");
    find(&passwd, &group, user, groups)
}

fn find(passwd: &str, group: &str, user: &str, extra: &[String]) -> Result<Identity, Failure> {
    let (name, group_name) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (user, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    // A name wins over a number: an image may have a user called "1000".
    let entry = entries(passwd, 7)
        .find(|e| e[0] == name)
        .or_else(|| entries(passwd, 7).find(|e| name.parse::<u32>().is_ok_and(|n| e[2].parse() == Ok(n))));
    let mut found = match &entry {
        Some(e) => Identity {
            uid: e[2].parse().map_err(|_| no_user(name))?,
            gid: e[3].parse().unwrap_or(0),
            groups: Vec::new(),
            home: if e[5].starts_with('/') { e[5].into() } else { "/".into() },
        },
        None => Identity {
            uid: name.parse().ok().filter(|&n| n != u32::MAX).ok_or_else(|| no_user(name))?,
            home: "/".into(),
            ..Identity::default()
        },
    };
    match (group_name, &entry) {
        (Some(wanted), _) => found.gid = group_id(group, wanted)?,
        (None, Some(e)) => {
            found.groups = entries(group, 4)
                .filter(|g| g[3].split(',').any(|member| member == e[0]))
                .filter_map(|g| g[2].parse().ok())
                .collect();
        }
        (None, None) => {}
    }
    for wanted in extra {
        found.groups.push(group_id(group, wanted)?);
    }
    found.groups.sort_unstable();
    found.groups.dedup();
    found.groups.truncate(MAX_GROUPS);
    Ok(found)
}

fn group_id(group: &str, wanted: &str) -> Result<u32, Failure> {
    let named = entries(group, 4).find(|e| e[0] == wanted).and_then(|e| e[2].parse().ok());
    named.or_else(|| wanted.parse().ok().filter(|&n| n != u32::MAX)).ok_or_else(|| {
        Failure::new(
            FailureKind::NoSuchUser,
            format!("The group {wanted:?} is not in the container's /etc/group"),
        )
    })
}

fn no_user(name: &str) -> Failure {
    Failure::new(FailureKind::NoSuchUser, format!("The user {name:?} is not in the container's /etc/passwd"))
}

/// The lines of a file that have at least `fields` fields, split.
fn entries(text: &str, fields: usize) -> impl Iterator<Item = Vec<&str>> {
    text.lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .filter(move |e| e.len() >= fields && !e[0].is_empty() && !e[0].starts_with('#'))
}

/// A file of the container, links resolved inside it; empty when it cannot be read.
pub fn file(root: &impl AsFd, path: &str) -> String {
    let contents = || {
        let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
        let fd = open_under(root, &cstring(path)?, flags, 0, libc::RESOLVE_IN_ROOT)?;
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; 16 << 10]);
        while bytes.len() < MAX_FILE {
            match read(&fd, &mut buffer)? {
                0 => break,
                n => bytes.extend_from_slice(&buffer[..n]),
            }
        }
        std::io::Result::Ok(bytes)
    };
    String::from_utf8_lossy(&contents().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34::/var/www:/bin/sh\n\
                          1000:x:7:8::/odd:\n# c\nbroken\nbad:x:many:1::/:\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\naudio:x:29:root,www\nvideo:x:44:www\n";

    fn who(user: &str) -> Identity {
        find(PASSWD, GROUP, user, &[]).unwrap()
    }

    #[test]
    fn an_empty_user_is_root_with_its_groups() {
        let root = who("");
        assert_eq!((root.uid, root.gid, root.home.as_str()), (0, 0, "/root"));
        assert_eq!(root.groups, [29]);
        assert_eq!(root, who("root"));
    }

    #[test]
    fn a_name_gives_its_group_and_supplementary_groups() {
        let www = who("www");
        assert_eq!((www.uid, www.gid, www.groups.as_slice()), (33, 34, &[29, 44][..]));
        assert_eq!(who("33"), www);
    }

    #[test]
    fn an_explicit_group_takes_the_place_of_all_others() {
        let www = who("www:video");
        assert_eq!((www.gid, www.groups.len()), (44, 0));
        assert_eq!(who("www:77").gid, 77);
        assert_eq!(who(":29").gid, 29);
    }

    #[test]
    fn a_number_need_not_be_in_the_file_but_a_name_must() {
        assert_eq!((who("4242").uid, who("4242").gid), (4242, 0));
        assert_eq!(who("4242").home, "/");
        for user in ["nobody", "www:nogroup", "-1", "4294967295", "4294967296", "bad", "1:-1"] {
            let error = find(PASSWD, GROUP, user, &[]).unwrap_err();
            assert_eq!(error.kind, FailureKind::NoSuchUser, "{user}");
        }
    }

    #[test]
    fn a_user_whose_name_is_a_number_is_found_by_name() {
        assert_eq!(who("1000").uid, 7);
    }

    #[test]
    fn extra_groups_are_added() {
        let all = find(PASSWD, GROUP, "www", &["27".into(), "root".into()]).unwrap();
        assert_eq!(all.groups, [0, 27, 29, 44]);
    }

    #[test]
    fn a_link_out_of_the_container_is_resolved_inside_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("real"), "inside").unwrap();
        std::os::unix::fs::symlink("../../../real", dir.path().join("etc/passwd")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join("etc/group")).unwrap();
        let root = std::fs::File::open(dir.path()).unwrap();
        assert_eq!(file(&root, "etc/passwd"), "inside");
        assert_eq!(file(&root, "etc/group"), "");
    }
}
