//! `nacelle cp`: files into and out of a running machine, by the rules of `docker cp`.
//!
//! ```text
//!   host files ── pack ──► tar ──► agent ── unpacks inside the container
//!   host files ◄─ unpack ── tar ◄── agent ── packs inside the container
//!   `-` stands for the tar archive itself
//! ```
//!
//! Each side reads and writes its own files, so paths and links mean there what they always
//! mean. What comes out of a machine is not trusted: see [`unpack`].

mod pack;
mod place;
mod unpack;

use std::{
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use clap::Args as ClapArgs;
use guest::protocol::{FailureKind, PathKind, PathStat};

use super::{
    door::Door,
    failure::{Failure, Outcome, doing},
    output,
    remote::Host,
    terminal,
};
use place::{End, Kind, Source, place};
use unpack::Unpacked;

/// Most links that are followed to find out where a path leads.
const MAX_LINKS: usize = 40;

/// Copy files between the host and a running machine
#[derive(Debug, ClapArgs)]
#[command(after_help = "\
A file or directory is copied into a directory that is there, or to a name that is not.\n\
DIRECTORY/. means the content of a directory. - means a tar archive: from standard input into\n\
a directory of the machine, or from the machine to standard output.")]
pub struct Args {
    /// Keep owners (user and group numbers)
    #[arg(short, long)]
    archive: bool,
    /// Follow a link that SOURCE is, instead of copying the link
    #[arg(short = 'L', long)]
    follow_link: bool,
    /// Print no summary
    #[arg(short, long)]
    quiet: bool,
    /// PATH, MACHINE:PATH or -
    source: String,
    /// PATH, MACHINE:PATH or -
    target: String,
}

/// Copies.
pub fn run(args: &Args, host: Option<&Host>) -> Outcome<u8> {
    let door = |word: &str| Door::open(word, host);
    match (End::parse(&args.source), End::parse(&args.target)) {
        (End::Inside { .. }, End::Inside { .. }) => Err(Failure::new(
            "Nothing can be copied from machine to machine at once; copy through the host, or pipe one cp - into \
             another",
        )),
        (End::Inside { machine, path }, End::Host(target)) => out(args, &door(&machine)?, &path, &target),
        (End::Inside { machine, path }, End::Stream) => out_as_tar(args, &door(&machine)?, &path),
        (End::Host(source), End::Inside { machine, path }) => into(args, &source, &door(&machine)?, &path),
        (End::Stream, End::Inside { machine, path }) => into_from_tar(args, &door(&machine)?, &path),
        _ => Err(Failure::new("One of the two must be in a machine, as in 'nacelle cp FILE MACHINE:/path'")),
    }
}

/// Machine to host.
fn out(args: &Args, door: &Door, path: &str, target: &Path) -> Outcome<u8> {
    // The root has no name of its own.
    let path = if path.trim_matches('/').is_empty() { "/." } else { path };
    let (stat, tar) = door.read_archive(path, args.follow_link)?;
    let source = Source::inside(path, stat.kind == PathKind::Directory);
    let there = host_kind(target);
    // An existing link is as good as what it leads to.
    let target = match there {
        Some(_) => doing(fs::canonicalize(target), || format!("{} cannot be found", target.display()))?,
        None => target.to_owned(),
    };
    let place = place(&source, &text(&target)?, there)?;
    let rules = unpack::Rules { keep_owner: args.archive, named: !source.contents };
    let unpacked = unpack::unpack(Path::new(&place.directory), place.name.as_deref(), tar, rules)?;
    for name in unpacked.left_out.iter().take(5) {
        eprintln!("nacelle: {} is a device, pipe or socket and was left out", output::clean(name));
    }
    if unpacked.left_out.len() > 5 {
        eprintln!("nacelle: {} more were left out", unpacked.left_out.len() - 5);
    }
    summary(args, unpacked);
    Ok(0)
}

fn summary(args: &Args, Unpacked { files, bytes, .. }: Unpacked) {
    if !args.quiet && terminal::is_terminal(2) {
        let files = if files == 1 { "1 file".to_owned() } else { format!("{files} files") };
        eprintln!("Copied {files}, {}", output::bytes(bytes));
    }
}

fn out_as_tar(args: &Args, door: &Door, path: &str) -> Outcome<u8> {
    if terminal::is_terminal(1) {
        return Err(Failure::new(
            "A tar archive is nothing for a terminal; redirect or pipe standard output",
        ));
    }
    let (_, mut tar) = door.read_archive(path, args.follow_link)?;
    let mut stdout = doing(super::streams::Own::Out.file(), || "Standard output cannot be used".to_owned())?;
    let copied = io::copy(&mut tar, &mut stdout).and_then(|_| stdout.flush());
    match copied {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(output::EXIT_UNREAD),
        other => doing(other, || format!("The archive of {path} could not be copied")).map(|()| 0),
    }
}

/// Host to machine.
fn into(args: &Args, source: &Path, door: &Door, path: &str) -> Outcome<u8> {
    let word = text(source)?;
    let contents = word == "." || word.ends_with("/.");
    let follow = args.follow_link || word.ends_with('/') || contents;
    let metadata = if follow { fs::metadata(source) } else { fs::symlink_metadata(source) };
    let metadata = doing(metadata, || format!("{} cannot be read", source.display()))?;
    if word.ends_with('/') && !metadata.is_dir() {
        return Err(Failure::new(format!("{} is no directory", source.display())));
    }
    let name = match source.file_name().filter(|_| !word.ends_with("..")) {
        Some(name) => name.to_string_lossy().into_owned(),
        None => doing(fs::canonicalize(source), || format!("{} cannot be found", source.display()))?
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default(),
    };
    // The host's root has no name either.
    let contents = contents || name.is_empty();
    let source_is = Source { name, is_directory: metadata.is_dir(), contents };
    let (target, there) = follow_inside(door, path)?;
    let place = place(&source_is, &target, there)?;
    let packed = pack::Packed::start(source.to_owned(), place.name.clone(), follow)?;
    let counted = packed.counter();
    door.write_archive(&place.directory, packed, args.archive, false)?;
    let (files, bytes) = counted.so_far();
    summary(args, Unpacked { files, bytes, left_out: Vec::new() });
    Ok(0)
}

fn into_from_tar(args: &Args, door: &Door, path: &str) -> Outcome<u8> {
    let stat = door.control()?.stat(path, true)?;
    if stat.kind != PathKind::Directory {
        return Err(Failure::new(format!(
            "{path} in the machine is no directory; an archive needs one to go to"
        )));
    }
    door.write_archive(path, io::stdin().lock().by_ref(), args.archive, false)?;
    Ok(0)
}

/// Where a path of the machine leads, links at its end followed, and what is there.
fn follow_inside(door: &Door, path: &str) -> Outcome<(String, Option<Kind>)> {
    let mut agent = door.control()?;
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        let stat: PathStat = match agent.stat(&path, false) {
            Err(guest::client::ClientError::Agent(e)) if e.kind == FailureKind::NoSuchPath => {
                return Ok((path, None));
            }
            other => other?,
        };
        match stat.kind {
            PathKind::Directory => return Ok((path, Some(Kind::Directory))),
            PathKind::Link => path = place::beside(&path, &stat.link),
            PathKind::File => return Ok((path, Some(Kind::File))),
            PathKind::Other => return Ok((path, Some(Kind::Special))),
        }
    }
    Err(Failure::new(format!("{path} in the machine is a link that leads from link to link without an end")))
}

fn host_kind(path: &Path) -> Option<Kind> {
    let metadata = fs::metadata(path).ok()?;
    Some(match metadata.file_type() {
        t if t.is_dir() => Kind::Directory,
        t if t.is_file() => Kind::File,
        _ => Kind::Special,
    })
}

fn text(path: &Path) -> Outcome<String> {
    let path: PathBuf = path.to_owned();
    path.into_os_string()
        .into_string()
        .map_err(|name| Failure::new(format!("{} is not valid UTF-8", name.display())))
}
