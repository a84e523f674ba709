//! The wire alone, without a pump: what a writer sees.

use std::{
    fs::File,
    io::{PipeReader, PipeWriter, Read, Seek},
    os::fd::FromRawFd,
};

use super::*;

fn pipe() -> (PipeReader, OwnedFd) {
    let (reader, writer): (PipeReader, PipeWriter) = io::pipe().unwrap();
    (reader, writer.into())
}

fn wire_to(writer: &OwnedFd) -> Wire {
    Wire::from_descriptors(None, Some(writer)).unwrap()
}

fn counter(wire: &Wire, name: &str) -> u64 {
    wire.counters().into_iter().find(|(n, _)| *n == name).unwrap().1
}

fn is_nonblocking(fd: &OwnedFd) -> bool {
    // SAFETY: reads the flags of an open descriptor.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) & libc::O_NONBLOCK != 0 }
}

#[test]
fn a_stopped_reader_neither_blocks_nor_grows_and_gets_the_newest() {
    let (mut reader, writer) = pipe();
    let wire = wire_to(&writer);
    let total = 4_000_000u32;
    let all: Vec<u8> = (0..total).map(|i| (i / 7) as u8).collect();
    let mut backlogs = 0;
    for chunk in all.chunks(1000) {
        backlogs += u32::from(wire.write(chunk));
    }
    assert_eq!(backlogs, 1, "the pump is told once");
    assert!(wire.lock().ring.capacity() <= 2 * CONSOLE_BUFFER);
    let taken = counter(&wire, "output_bytes");
    assert_eq!(wire.dropped(), u64::from(total) - taken - CONSOLE_BUFFER as u64);

    let mut first = vec![0; taken as usize];
    reader.read_exact(&mut first).unwrap();
    assert_eq!(first, all[..taken as usize]);
    assert!(wire.finish(Duration::from_secs(1)));
    let mut rest = vec![0; CONSOLE_BUFFER];
    reader.read_exact(&mut rest).unwrap();
    assert_eq!(rest, all[all.len() - CONSOLE_BUFFER..]);
    assert_eq!(wire.drain(), Drained::Empty);
    assert_eq!(wire.lock().ring.capacity(), 0, "an idle console keeps no buffer");
}

#[test]
fn a_writers_open_file_is_left_as_it_was() {
    let (_reader, writer) = pipe();
    let wire = wire_to(&writer);
    wire.write(&[0; 200_000]);
    assert!(!is_nonblocking(&writer), "the pipe of others must keep blocking for them");
    drop(wire);
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let socket = OwnedFd::from(socket);
    let wire = wire_to(&socket);
    wire.write(&vec![0; 10_000_000]);
    assert!(!is_nonblocking(&socket));
}

#[test]
fn a_reader_that_went_away_costs_bytes_and_nothing_else() {
    let (reader, writer) = pipe();
    let wire = wire_to(&writer);
    drop(reader);
    for _ in 0..10 {
        wire.write(b"nobody hears this");
    }
    assert_eq!(wire.drain(), Drained::Broken);
    wire.set_sink(None);
    assert_eq!((wire.drain(), wire.write(b"!")), (Drained::Nobody, false));
    assert_eq!(wire.dropped(), 10 * 17 + 1);
}

#[test]
fn a_file_is_added_to_and_a_directory_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.log");
    std::fs::write(&path, "before ").unwrap();
    let wire = Wire::open(&Output::File(path.clone())).unwrap();
    assert!(wire.needs_no_pump());
    assert_eq!(wire.place(), Some(path.as_path()));
    assert!(!wire.write(b"after"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "before after");
    let error = Wire::open(&Output::File(dir.path().to_owned())).err().unwrap();
    assert!(error.to_string().contains("is a directory"), "{error}");
    let lost = dir.path().join("no/such/file");
    let error = Wire::open(&Output::File(lost.clone())).err().unwrap();
    assert!(error.to_string().contains(lost.to_str().unwrap()), "{error}");
}

#[test]
fn a_file_that_takes_no_more_drops_bytes_and_goes_on() {
    // A regular file that may not grow stands for one on a full disk.
    // SAFETY: makes a descriptor from a C string; the result is checked and owned here alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"full".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    };
    let same = File::from(file.try_clone().unwrap());
    same.set_len(4).unwrap();
    // SAFETY: sets the seals of an open descriptor.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) };
    let wire = wire_to(&file);
    assert!(wire.needs_no_pump());
    for _ in 0..3 {
        assert!(!wire.write(b"12345"));
    }
    assert_eq!(counter(&wire, "output_bytes") + wire.dropped(), 15);
    assert!(wire.dropped() >= 11 && wire.lock().ring.is_empty());
    (&same).seek(io::SeekFrom::Start(0)).unwrap();
    wire.write(b"more");
    assert_eq!(io::read_to_string(same).unwrap(), "", "the offset is shared and at the end");
    assert!(wire.drain() == Drained::Empty, "the file is not given up");
}

#[test]
fn a_named_pipe_may_be_opened_before_its_reader() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a valid C string that lives across the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let wire = Wire::open(&Output::File(path.clone())).unwrap();
    wire.write(b"hello");
    let mut reader = File::open(&path).unwrap();
    let mut text = [0; 5];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
}

#[test]
fn nothing_at_the_far_end_swallows_and_counts_nothing() {
    let wire = Wire::open(&Output::None).unwrap();
    assert!(wire.needs_no_pump());
    assert!(!wire.write(&[7; 100_000]));
    assert_eq!((wire.dropped(), wire.lock().ring.capacity()), (0, 0));
}

#[test]
fn output_without_a_client_keeps_the_last_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let wire = Wire::open(&Output::Socket(path.clone())).unwrap();
    let all: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    all.chunks(4096).for_each(|part| {
        wire.write(part);
    });
    let kept: Vec<u8> = wire.lock().ring.iter().copied().collect();
    assert_eq!(kept, all[all.len() - CONSOLE_BUFFER..]);
    assert!(Wire::open(&Output::Socket(path.clone())).is_err(), "a socket in use is not taken over");
    let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600, "other users can connect");
    drop(wire);
    assert!(!path.exists());
    // One left behind by a process that was killed is.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let wire = Wire::open(&Output::Socket(path.clone())).unwrap();
    drop(wire);
    std::fs::write(&path, "a file of somebody").unwrap();
    assert!(Wire::open(&Output::Socket(path.clone())).is_err());
    assert!(path.exists());
}

#[test]
fn finish_gives_up_on_a_reader_that_does_not_read() {
    let (_reader, writer) = pipe();
    let wire = wire_to(&writer);
    wire.write(&vec![b'x'; 500_000]);
    let start = Instant::now();
    assert!(!wire.finish(Duration::from_millis(50)));
    assert!(start.elapsed() < Duration::from_secs(5));
}
