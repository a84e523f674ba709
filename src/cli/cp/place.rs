//! Where a copy goes: Docker's rules, apart from any file system.

use std::path::PathBuf;

use crate::cli::failure::{Failure, Outcome};

/// One end of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// A path of the host.
    Host(PathBuf),
    /// A path of a machine, made absolute.
    Inside {
        /// Name, id or start of an id.
        machine: String,
        /// Absolute path.
        path: String,
    },
    /// Standard input or output, as a tar archive.
    Stream,
}

impl End {
    /// Reads `PATH`, `MACHINE:PATH` or `-`. What begins with `/` or `.` is a path of the host,
    /// so a file with a colon in its name is `./a:b`.
    pub fn parse(word: &str) -> End {
        if word == "-" {
            return End::Stream;
        }
        match word.split_once(':') {
            Some((machine, path))
                if !machine.is_empty() && !word.starts_with(['/', '.']) && !machine.contains('/') =>
            {
                let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
                End::Inside { machine: machine.to_owned(), path }
            }
            _ => End::Host(word.into()),
        }
    }
}

/// What is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The last component of its path.
    pub name: String,
    /// It is a directory.
    pub is_directory: bool,
    /// Only what is in the directory (`DIRECTORY/.`).
    pub contents: bool,
}

impl Source {
    /// The source at an absolute path of a machine.
    pub fn inside(path: &str, is_directory: bool) -> Source {
        let contents = path.ends_with("/.");
        let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
        Source { name, is_directory, contents }
    }
}

/// What is at the place to copy to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A device, pipe or socket.
    Special,
}

/// Where a copy goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// An existing directory (or one whose absence is an error).
    pub directory: String,
    /// The name there; without one the content goes straight into the directory.
    pub name: Option<String>,
}

/// Where `source` goes when it is copied to `target`, at which `there` is.
pub fn place(source: &Source, target: &str, there: Option<Kind>) -> Outcome<Place> {
    let wants_directory = target.ends_with('/') || target.ends_with("/.");
    match there {
        Some(Kind::Directory) => {
            let name = (!source.contents).then(|| source.name.clone());
            Ok(Place { directory: target.to_owned(), name })
        }
        Some(_) if source.is_directory => Err(Failure::new(format!(
            "{target} is no directory, so the directory {:?} cannot go there",
            source.name
        ))),
        Some(Kind::Special) => {
            Err(Failure::new(format!("{target} is a device, pipe or socket; it is not replaced by a copy")))
        }
        Some(Kind::File) if wants_directory => Err(Failure::new(format!("{target} is no directory"))),
        None if wants_directory && !source.is_directory => {
            Err(Failure::new(format!("The directory {target} does not exist; make it first")))
        }
        _ => {
            let plain = target.strip_suffix("/.").unwrap_or(target).trim_end_matches('/');
            let (directory, name) = match plain.rsplit_once('/') {
                Some(("", name)) => ("/", name),
                Some(split) => split,
                None => (".", plain),
            };
            Ok(Place { directory: directory.to_owned(), name: Some(name.to_owned()) })
        }
    }
}

/// The path that a link at `path` with the text `link` leads to. Nothing is simplified: what
/// `..` means is for the file system to say.
pub fn beside(path: &str, link: &str) -> String {
    if link.starts_with('/') {
        return link.to_owned();
    }
    let directory = path.trim_end_matches('/').rsplit_once('/').map_or("", |(directory, _)| directory);
    format!("{directory}/{link}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Source {
        Source { name: "f".to_owned(), is_directory: false, contents: false }
    }

    fn directory(contents: bool) -> Source {
        Source { name: "d".to_owned(), is_directory: true, contents }
    }

    fn to(source: &Source, target: &str, there: Option<Kind>) -> Option<(String, Option<String>)> {
        place(source, target, there).ok().map(|p| (p.directory, p.name))
    }

    fn at(directory: &str, name: Option<&str>) -> Option<(String, Option<String>)> {
        Some((directory.to_owned(), name.map(str::to_owned)))
    }

    #[test]
    fn a_colon_makes_a_machine_unless_the_word_begins_like_a_path() {
        let inside = |m: &str, p: &str| End::Inside { machine: m.to_owned(), path: p.to_owned() };
        assert_eq!(End::parse("web:/etc/hosts"), inside("web", "/etc/hosts"));
        assert_eq!(End::parse("web:etc"), inside("web", "/etc"));
        assert_eq!(End::parse("web:"), inside("web", "/"));
        assert_eq!(End::parse("web:/a:b"), inside("web", "/a:b"));
        for word in ["/a:b", "./a:b", "a", ":a", "dir/a:b"] {
            assert_eq!(End::parse(word), End::Host(word.into()), "{word}");
        }
        assert_eq!(End::parse("-"), End::Stream);
    }

    #[test]
    fn a_file_goes_into_a_directory_or_becomes_the_target() {
        assert_eq!(to(&file(), "/x", Some(Kind::Directory)), at("/x", Some("f")));
        assert_eq!(to(&file(), "/x/y", None), at("/x", Some("y")));
        assert_eq!(to(&file(), "/y", Some(Kind::File)), at("/", Some("y")));
        assert_eq!(to(&file(), "y", None), at(".", Some("y")));
        assert_eq!(to(&file(), "/x/y/", None), None);
        assert_eq!(to(&file(), "/x/y/", Some(Kind::File)), None);
        assert_eq!(to(&file(), "/dev/null", Some(Kind::Special)), None);
    }

    #[test]
    fn a_directory_goes_into_one_or_becomes_one() {
        assert_eq!(to(&directory(false), "/x", Some(Kind::Directory)), at("/x", Some("d")));
        assert_eq!(to(&directory(true), "/x", Some(Kind::Directory)), at("/x", None));
        assert_eq!(to(&directory(false), "/x/y", None), at("/x", Some("y")));
        assert_eq!(to(&directory(true), "/x/y/", None), at("/x", Some("y")));
        assert_eq!(to(&directory(false), "/x", Some(Kind::File)), None);
    }

    #[test]
    fn a_source_in_a_machine_is_named_after_its_path() {
        assert_eq!(Source::inside("/etc/hosts", false).name, "hosts");
        assert_eq!(Source::inside("/etc/", true), Source { name: "etc".to_owned(), ..directory(false) });
        assert!(Source::inside("/etc/.", true).contents && Source::inside("/.", true).contents);
    }

    #[test]
    fn a_link_leads_on_from_where_it_is() {
        assert_eq!(beside("/a/b", "c"), "/a/c");
        assert_eq!(beside("/b", "../c"), "/../c");
        assert_eq!(beside("/a/b", "/c"), "/c");
    }
}
