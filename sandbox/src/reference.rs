//! # What the argument IMAGE means
//!
//! ```text
//!   oci:DIR[:TAG]  oci-archive:FILE[:TAG]  docker-archive:FILE[:NAME]  dir:DIR      as said
//!   /x  ./x  ../x  .  ..                                                            that path
//!   x, where a file or an OCI layout of that name exists                            that path
//!   x, where a directory with bin, sbin, usr or etc in it exists                    that path
//!   everything else                                                      a registry reference
//! ```
//!
//! The last path rule has a condition because `nacelle run python` in a project that happens to
//! have a directory `python` means the image. A path that is written as one and does not exist
//! is an error that names it, never a pull of something that looks alike.
//!
//! References follow Docker's grammar (`distribution/reference`): `docker.io` and `library/`
//! where left out, tag `latest` where neither tag nor digest is given, the first component is a
//! host when it contains a dot or a colon or is `localhost`.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::digest::Digest;

/// Where Docker's short names live.
const HUB: &str = "docker.io";
/// The longest repository name with its host, in characters (Docker's own limit).
const NAME_LENGTH: usize = 255;

/// Why the argument IMAGE means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Not of the form of a reference.
    #[error("'{text}' is no image reference: {why}")]
    Invalid {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A path that is not there.
    #[error("No image at '{}': the path does not exist", path.display())]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// A path that is there and of the wrong kind.
    #[error("'{}' is no {wanted}", path.display())]
    WrongKind {
        /// The path.
        path: PathBuf,
        /// What it should have been.
        wanted: &'static str,
    },
}

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Reads a reference and fills in what Docker would.
    ///
    /// # Errors
    /// [`ReferenceError::Invalid`] with the rule that is broken.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        Self::split(text)
            .map_err(|why| ReferenceError::Invalid { text: text.chars().take(NAME_LENGTH).collect(), why })
    }

    fn split(text: &str) -> Result<Self, &'static str> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest = Digest::parse(digest);
                let why = "after '@' it needs 'sha256:' and 64 lower-case hexadecimal digits";
                (rest, Some(digest.ok_or(why)?))
            }
            None => (text, None),
        };
        // A colon before the last slash is a port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(
                "a tag has 1 to 128 letters, digits, '_', '.' and '-', and does not start with '.' or '-'",
            );
        }
        let (host, path) = match name.split_once('/') {
            Some((host, path)) if is_host(host) => (host, path),
            _ => (HUB, name),
        };
        let host = if host == "index.docker.io" { HUB } else { host };
        if path.is_empty() {
            return Err("the name is empty");
        }
        if path.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err("names are lower-case");
        }
        if !path.split('/').all(is_component) {
            return Err(
                "a name has lower-case letters and digits, with single '.', '_', '__' or '-' between them",
            );
        }
        if host == HUB && Digest::from_hex(path).is_some() {
            return Err("64 hexadecimal digits are an image id, not a name");
        }
        let repository = match path.contains('/') {
            false if host == HUB => format!("library/{path}"),
            _ => path.to_owned(),
        };
        if host.len() + 1 + repository.len() > NAME_LENGTH {
            return Err("the name is longer than 255 characters");
        }
        let tag = match (tag, &digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self { host: host.to_owned(), repository, tag, digest })
    }

    /// The registry as written, with its port: `docker.io`, `localhost:5000`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository in that registry: `library/busybox`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one is given or no digest is.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest of the manifest, if given; it wins over the tag.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }
}

/// The full form: `docker.io/library/busybox:latest`.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let first = tag.bytes().next().is_some_and(word);
    first && tag.len() <= 128 && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

fn is_host(text: &str) -> bool {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (text, None),
    };
    if port.is_some_and(|p| p.parse::<u16>().is_err() || p.starts_with('+')) {
        return false;
    }
    let marked =
        text.contains(['.', ':']) || text == "localhost" || text.bytes().any(|b| b.is_ascii_uppercase());
    if let Some(inner) = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')) {
        return inner.parse::<std::net::Ipv6Addr>().is_ok();
    }
    let label = |l: &str| {
        let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
        edge(l.bytes().next())
            && edge(l.bytes().last())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    marked && name.split('.').all(label)
}

/// `[a-z0-9]+` joined by one `.`, one or two `_`, or any number of `-`.
fn is_component(text: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut separators = text.split(|c: char| c.is_ascii() && alnum(c as u8)).filter(|s| !s.is_empty());
    let edges = text.bytes().next().is_some_and(alnum) && text.bytes().last().is_some_and(alnum);
    edges && separators.all(|s| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A registry.
    Registry(Reference),
    /// A directory in the OCI image layout.
    Layout {
        /// The directory with `oci-layout` in it.
        path: PathBuf,
        /// Which image of several: its name annotation.
        pick: Option<String>,
    },
    /// A tar file, gzip'ed or not: what `docker save` writes, or an OCI layout.
    Archive {
        /// The file.
        path: PathBuf,
        /// Which image of several: its name.
        pick: Option<String>,
    },
    /// A directory that is the root file system.
    Directory {
        /// The directory.
        path: PathBuf,
    },
}

impl Source {
    /// Decides what `text` is (see the top of this file); looks at the file system.
    ///
    /// # Errors
    /// [`ReferenceError`], where it is neither something that exists nor a reference.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if let Some((scheme @ ("oci" | "oci-archive" | "docker-archive" | "dir"), rest)) =
            text.split_once(':')
            && !rest.is_empty()
        {
            return Self::of_scheme(scheme, rest);
        }
        let path = Path::new(text);
        let written_as_path = text.starts_with(['/', '.']);
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() && path.join("oci-layout").is_file() => {
                Ok(Self::Layout { path: path.to_owned(), pick: None })
            }
            Ok(found) if found.is_dir() && (written_as_path || looks_like_root(path)) => {
                Ok(Self::Directory { path: path.to_owned() })
            }
            Ok(found) if found.is_file() => Ok(Self::Archive { path: path.to_owned(), pick: None }),
            Ok(_) if written_as_path => Err(ReferenceError::WrongKind {
                path: path.to_owned(),
                wanted: "directory and no regular file",
            }),
            Err(_) if written_as_path => Err(ReferenceError::Missing { path: path.to_owned() }),
            _ => Reference::parse(text).map(Self::Registry),
        }
    }

    fn of_scheme(scheme: &str, rest: &str) -> Result<Self, ReferenceError> {
        // A path may contain a colon: the longest one that exists is the path.
        let (path, pick) = match rest.split_once(':') {
            Some((path, pick)) if scheme != "dir" && !Path::new(rest).exists() => {
                (path, Some(pick.to_owned()))
            }
            _ => (rest, None),
        };
        let path = PathBuf::from(path);
        let found = std::fs::metadata(&path).map_err(|_| ReferenceError::Missing { path: path.clone() })?;
        match scheme {
            "dir" if found.is_dir() => Ok(Self::Directory { path }),
            "dir" => Err(ReferenceError::WrongKind { path, wanted: "directory" }),
            "oci" if found.is_dir() => Ok(Self::Layout { path, pick }),
            _ if found.is_file() => Ok(Self::Archive { path, pick }),
            _ => Err(ReferenceError::WrongKind { path, wanted: "regular file" }),
        }
    }
}

/// How the source is named to a person.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, pick) = match self {
            Self::Registry(reference) => return reference.fmt(f),
            Self::Layout { path, pick } | Self::Archive { path, pick } => (path, pick.as_deref()),
            Self::Directory { path } => (path, None),
        };
        write!(f, "{}", path.display())?;
        pick.map_or(Ok(()), |pick| write!(f, ":{pick}"))
    }
}

fn looks_like_root(path: &Path) -> bool {
    ["bin", "sbin", "usr", "etc"].iter().any(|name| path.join(name).symlink_metadata().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(text: &str) -> String {
        Reference::parse(text).map_or_else(|e| e.to_string(), |r| r.to_string())
    }

    #[test]
    fn short_names_are_filled_in_as_docker_does() {
        let hex = "a".repeat(64);
        for (short, long) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".to_owned()),
            ("docker.io/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("index.docker.io/a/b", "docker.io/a/b:latest".to_owned()),
            ("user/app", "docker.io/user/app:latest".to_owned()),
            ("localhost/x", "localhost/x:latest".to_owned()),
            ("localhost:5000/x", "localhost:5000/x:latest".to_owned()),
            ("localhost:5000/x:y", "localhost:5000/x:y".to_owned()),
            ("[::1]:5000/x", "[::1]:5000/x:latest".to_owned()),
            ("host.example/a/b/c", "host.example/a/b/c:latest".to_owned()),
            ("a__b/c--d.e", "docker.io/a__b/c--d.e:latest".to_owned()),
            (&format!("x@sha256:{hex}"), format!("docker.io/library/x@sha256:{hex}")),
            (&format!("x:t@sha256:{hex}"), format!("docker.io/library/x:t@sha256:{hex}")),
        ] {
            assert_eq!(full(short), long);
        }
    }

    #[test]
    fn what_docker_refuses_is_refused() {
        let hex = "a".repeat(64);
        let long = "a/".repeat(200) + "a";
        for bad in [
            "",
            ":",
            "@",
            "x:",
            "x@",
            "X",
            "a//b",
            "/a",
            "a/",
            "a..b",
            "a___b",
            "-a",
            "a-",
            "a b",
            "x:.y",
            "x@sha256:12",
            "x@md5:12",
            &hex,
            &long,
            "host:99999/x",
            "ä",
            "a/../b",
            "x\0y",
        ] {
            let error = Reference::parse(bad).unwrap_err();
            assert!(matches!(error, ReferenceError::Invalid { .. }), "{bad:?}: {error}");
        }
    }

    #[test]
    fn a_path_that_does_not_exist_is_no_pull() {
        for text in ["./missing", "/missing/too", "../missing", "oci:/missing:tag", "dir:missing"] {
            let error = Source::parse(text).unwrap_err();
            assert!(matches!(error, ReferenceError::Missing { .. }), "{text}: {error}");
        }
    }

    #[test]
    fn what_exists_decides_what_a_path_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["layout", "plain", "root/etc"] {
            std::fs::create_dir_all(path(name)).unwrap();
        }
        std::fs::write(path("layout/oci-layout"), "{}").unwrap();
        std::fs::write(path("a.tar"), "").unwrap();
        let of = |name: &str| Source::parse(path(name).to_str().unwrap()).unwrap();
        assert!(matches!(of("layout"), Source::Layout { pick: None, .. }));
        assert!(matches!(of("plain"), Source::Directory { .. }));
        assert!(matches!(of("a.tar"), Source::Archive { pick: None, .. }));
        let text = format!("oci:{}:v1", path("layout").display());
        let layout = Source::parse(&text).unwrap();
        assert!(matches!(&layout, Source::Layout { pick: Some(p), .. } if p == "v1"));
        assert!(looks_like_root(&path("root")) && !looks_like_root(&path("plain")));
    }
}
