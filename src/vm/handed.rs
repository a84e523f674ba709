//! Descriptors that came with requests (`SCM_RIGHTS`), kept for the machine that is to be built.
//!
//! ```text
//!   PUT /drives/a {"by_descriptor": true} + 1 descriptor ──► Gift::of: right kind and number?
//!   PUT /network-interfaces/b ...         + n descriptors          │
//!                                                                  ▼
//!   InstanceStart ──► build.rs ◄── copies ── Handed: by device, until the machine is built
//! ```
//!
//! Who may not open a file or make a tap can be given one that somebody else opened: the monitor
//! then needs no path and no privilege, and a disk may be a file that has no name any more. What
//! came is looked at when it comes, so that the request that brought something wrong is told. The
//! builder gets copies, so a refused start can be corrected and asked for again.
//!
//! Descriptors that nobody asked for are refused with their request, and closed.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use api::{
    Fault, FaultKind, Request,
    spec::{Drive, NetworkInterface},
};
use devices::{
    disk::{Disk, DiskOptions},
    virtio::net::Tap,
};

/// Descriptors that wait for a start at most: as many as a few hundred requests of one each, and
/// well below what a process may have.
const HANDED_MAX: usize = 256;

/// What a disk that came as a descriptor is called in messages.
const NAME: &str = "(by descriptor)";

/// A device, by its kind and name.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Owner {
    Drive(String),
    Interface(String),
}

/// What came with one request, looked at.
#[derive(Debug)]
pub struct Gift {
    /// None: the request is about no device that can come as a descriptor.
    owner: Option<Owner>,
    descriptors: Vec<OwnedFd>,
}

impl Gift {
    /// Looks at the descriptors that came with `request`: whether it asked for them, and for as
    /// many, and whether they are of the right kind.
    pub fn of(request: &Request, descriptors: Vec<OwnedFd>) -> Result<Gift, Fault> {
        let came = descriptors.len();
        let owner = match request {
            Request::PutDrive(drive) => {
                let wanted = usize::from(drive.by_descriptor);
                expect(&format!("Drive {:?}", drive.drive_id), wanted, came)?;
                descriptors.first().map_or(Ok(()), |file| check_disk(drive, file))?;
                Some(Owner::Drive(drive.drive_id.clone()))
            }
            Request::PutNetworkInterface(interface) => {
                let pairs = if interface.by_descriptor { interface.num_queue_pairs } else { 0 };
                expect(&format!("Interface {:?}", interface.iface_id), pairs.into(), came)?;
                if came > 0 {
                    Tap::check(&descriptors, pairs).map_err(|e| Fault::from_error(FaultKind::Invalid, &e))?;
                }
                Some(Owner::Interface(interface.iface_id.clone()))
            }
            _ if came == 0 => None,
            _ => return Err(unasked(came)),
        };
        Ok(Gift { owner, descriptors })
    }
}

/// Why descriptors are refused that came with a request which takes none.
pub fn unasked(came: usize) -> Fault {
    let text = "came with a request that takes none; they go with PUT /drives/{id} and PUT \
                /network-interfaces/{id}";
    Fault::new(FaultKind::Invalid, format!("{} {text}", count(came)))
}

fn count(descriptors: usize) -> String {
    if descriptors == 1 { "1 descriptor".to_owned() } else { format!("{descriptors} descriptors") }
}

fn expect(what: &str, wanted: usize, came: usize) -> Result<(), Fault> {
    let (had, needs) = (count(came), count(wanted));
    match (wanted, came) {
        _ if wanted == came => Ok(()),
        (0, _) => Err(Fault::new(
            FaultKind::Invalid,
            format!("{what} is not by_descriptor, and {had} came with the request"),
        )),
        _ => Err(Fault::new(
            FaultKind::Invalid,
            format!("{what} is by_descriptor and needs {needs} (SCM_RIGHTS); {had} came with the request"),
        )),
    }
}

fn check_disk(drive: &Drive, descriptor: &OwnedFd) -> Result<(), Fault> {
    let options = DiskOptions { read_only: drive.is_read_only, direct: drive.direct };
    let copied = descriptor.try_clone().map(File::from);
    let file = copied.map_err(|e| Fault::from_error(FaultKind::Internal, &e))?;
    Disk::check(&file, Path::new(NAME), options).map_err(|e| Fault {
        kind: FaultKind::Invalid,
        message: format!("Drive {:?} cannot be set up", drive.drive_id),
        causes: vec![e.to_string()],
    })
}

/// All that came and waits.
#[derive(Debug, Default)]
pub struct Handed(Vec<(Owner, Vec<OwnedFd>)>);

impl Handed {
    /// Keeps what came for a device, instead of what came for it before.
    ///
    /// Refuses when too many wait already; nothing is changed then.
    pub fn keep(&mut self, gift: Gift) -> Result<(), Fault> {
        let Some(owner) = gift.owner else { return Ok(()) };
        let others = self.0.iter().filter(|(other, _)| *other != owner);
        let waiting: usize = others.map(|(_, descriptors)| descriptors.len()).sum();
        if waiting + gift.descriptors.len() > HANDED_MAX {
            let text = format!("{waiting} descriptors wait for the start; at most {HANDED_MAX} may");
            return Err(Fault::new(FaultKind::Invalid, text));
        }
        self.0.retain(|(other, _)| *other != owner);
        if !gift.descriptors.is_empty() {
            self.0.push((owner, gift.descriptors));
        }
        Ok(())
    }

    /// Closes everything: the machine has copies of its own.
    pub fn clear(&mut self) {
        self.0 = Vec::new();
    }

    /// The file of a disk, and what it is called.
    pub fn disk(&self, drive: &Drive) -> io::Result<(File, PathBuf)> {
        let mut copies = self.copies(&Owner::Drive(drive.drive_id.clone()))?;
        let file = copies.pop().ok_or_else(missing)?;
        Ok((file.into(), NAME.into()))
    }

    /// The descriptors of a tap.
    pub fn tap(&self, interface: &NetworkInterface) -> io::Result<Vec<OwnedFd>> {
        self.copies(&Owner::Interface(interface.iface_id.clone()))
    }

    fn copies(&self, owner: &Owner) -> io::Result<Vec<OwnedFd>> {
        let found = self.0.iter().find(|(other, _)| other == owner).ok_or_else(missing)?;
        found.1.iter().map(OwnedFd::try_clone).collect()
    }
}

fn missing() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "No descriptor came for it; they come over the API socket only")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(by_descriptor: bool, is_read_only: bool) -> Request {
        let drive_id = "data".to_owned();
        Request::PutDrive(Drive { drive_id, by_descriptor, is_read_only, ..Drive::default() })
    }

    fn interface(num_queue_pairs: u16) -> Request {
        let text =
            format!(r#"{{"iface_id": "eth0", "by_descriptor": true, "num_queue_pairs": {num_queue_pairs}}}"#);
        Request::PutNetworkInterface(serde_json::from_str(&text).unwrap())
    }

    fn image() -> OwnedFd {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        file.into()
    }

    fn refused(request: &Request, descriptors: Vec<OwnedFd>) -> String {
        Gift::of(request, descriptors).unwrap_err().to_string()
    }

    #[test]
    fn a_file_without_a_name_waits_for_its_disk() {
        let mut handed = Handed::default();
        handed.keep(Gift::of(&drive(true, false), vec![image()]).unwrap()).unwrap();
        let Request::PutDrive(wanted) = drive(true, false) else { unreachable!() };
        let (file, _) = handed.disk(&wanted).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4096);
        // The same disk by a path needs it no more.
        handed.keep(Gift::of(&drive(false, false), Vec::new()).unwrap()).unwrap();
        assert!(handed.disk(&wanted).unwrap_err().to_string().contains("No descriptor came"));
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let folder = File::open("/").unwrap().into();
        assert!(refused(&drive(true, true), vec![folder]).contains("is a directory"));
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        assert!(refused(&drive(true, false), vec![null.into()]).contains("neither a regular file"));
        let image = tempfile::NamedTempFile::new().unwrap();
        let reader = || OwnedFd::from(File::open(image.path()).unwrap());
        assert!(refused(&drive(true, false), vec![reader()]).contains("not open for reading and writing"));
        assert!(Gift::of(&drive(true, true), vec![reader()]).is_ok());
    }

    #[test]
    fn as_many_come_as_were_asked_for() {
        assert!(refused(&drive(true, false), Vec::new()).contains("needs 1 descriptor"));
        assert!(refused(&drive(true, false), vec![image(), image()]).contains("2 descriptors came"));
        assert!(refused(&drive(false, false), vec![image()]).contains("is not by_descriptor"));
        assert!(refused(&interface(2), vec![image()]).contains("needs 2 descriptors"));
        assert!(refused(&interface(1), vec![image()]).contains("not a tap"));
        assert!(refused(&Request::Start, vec![image()]).contains("takes none"));
    }

    #[test]
    fn only_so_many_wait() {
        let mut handed = Handed::default();
        let gift = |id: usize| Gift { owner: Some(Owner::Drive(id.to_string())), descriptors: vec![image()] };
        for id in 0..HANDED_MAX {
            handed.keep(gift(id)).unwrap();
        }
        assert!(handed.keep(gift(HANDED_MAX)).unwrap_err().to_string().contains("at most 256"));
        handed.keep(gift(0)).unwrap();
    }
}
