//! Disks: data both ways, flush, discard, several queues, both engines, with and without the
//! host's page cache, read-only.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};

use api::spec::{CacheType, Drive, IoEngine, Transport};

use crate::{
    kernel::Kernel,
    vm::{Ended, Setup, random_file, sha256},
};

const MIB: usize = 1 << 20;
const QUEUES: usize = 4;

/// A block device on top of a file: what `O_DIRECT` surely works on, whatever the file system.
struct Loop(PathBuf);

impl Loop {
    fn of(file: &Path) -> Loop {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "losetup makes no loop device: {said}");
        Loop(String::from_utf8(output.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// On `vda` (read-only): reads, and tries to write. On `vdb`: one writer for each processor and
/// so for each queue, a flush, a discard in the middle, zeroes. On `vdc`: without page cache.
const SCRIPT: &str = r#"
sum() { sha256sum | cut -d' ' -f1; }
fact serials $(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial) $(cat /sys/block/vdc/serial)
fact sizes $(cat /sys/block/vda/size) $(cat /sys/block/vdb/size) $(cat /sys/block/vdc/size)
fact read-only $(cat /sys/block/vda/ro) $(cat /sys/block/vdb/ro)
fact caches $(cat /sys/block/vda/queue/write_cache), $(cat /sys/block/vdb/queue/write_cache)
fact queues $(ls /sys/block/vdb/mq | wc -l)

fact sum-a $(sum < /dev/vda)
dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync && fact write accepted || fact write refused

for i in 0 1 2 3; do
  dd if=/dev/urandom of=/tmp/$i bs=1M count=2
  taskset -c $i dd if=/tmp/$i of=/dev/vdb bs=64k seek=$((i * 32)) conv=fsync,notrunc &
done
wait
cat /tmp/0 /tmp/1 /tmp/2 /tmp/3 > /tmp/all
fact sum-b $(sum < /tmp/all)
echo 3 > /proc/sys/vm/drop_caches
fact again-b $(head -c 8388608 /dev/vdb | sum)
blkdiscard -o 10485760 -l 4194304 /dev/vdb
fact discarded-b $(dd if=/dev/vdb bs=1M skip=10 count=4 | sum)

fact sum-c $(sum < /dev/vdc)
dd if=/tmp/0 of=/dev/vdc bs=1M conv=fsync,notrunc
echo 3 > /proc/sys/vm/drop_caches
fact new-c $(head -c 2097152 /dev/vdc | sum)
fact sum-0 $(sum < /tmp/0)
"#;

fn drive(id: &str, path: &Path) -> Drive {
    Drive {
        drive_id: id.to_owned(),
        path_on_host: path.to_owned(),
        num_queues: 1,
        queue_size: 256,
        ..Drive::default()
    }
}

fn disks_keep_what_is_written(kernel: Kernel, transport: Transport, engines: [IoEngine; 3]) {
    let mut setup = Setup::new(kernel, transport).size(4, 320).script(SCRIPT);
    let [a, b, c] = ["a", "b", "c"].map(|name| setup.folder().join(name));
    let first = random_file(&a, 8, 1);
    let before = random_file(&b, 16, 2);
    let third = random_file(&c, 4, 3);
    let device = Loop::of(&c);
    let (blocks, [first_engine, second_engine, third_engine]) = (fs::metadata(&b).unwrap().blocks(), engines);
    setup.spec.drives = vec![
        Drive { is_read_only: true, io_engine: first_engine, ..drive("first", &a) },
        Drive {
            cache_type: CacheType::Writeback,
            io_engine: second_engine,
            num_queues: QUEUES as u16,
            discard: true,
            ..drive("a_name_longer_than_a_serial_number", &b)
        },
        Drive {
            cache_type: CacheType::Writeback,
            io_engine: third_engine,
            direct: true,
            ..drive("direct", &device.0)
        },
    ];
    let ended = setup.start().succeed();

    ended.is("serials", "first a_name_longer_than_a direct");
    ended.is("sizes", &format!("{} {} {}", 8 << 11, 16 << 11, 4 << 11));
    ended.is("read-only", "1 0");
    ended.is("caches", "write through, write back");
    ended.is("queues", &QUEUES);
    check_read_only_disk(&ended, &first, &a);
    check_written_disk(&ended, &before, blocks, &b);
    ended.is("sum-c", &sha256(&third));
    ended.is("new-c", &ended.fact("sum-0"));
    drop(device);
    let now = fs::read(&c).unwrap();
    assert_eq!(sha256(&now[..2 * MIB]), ended.fact("sum-0"), "what was written without cache is not there");
    assert!(now[2 * MIB..] == third[2 * MIB..], "more than what was written has changed");
}

fn check_read_only_disk(ended: &Ended, data: &[u8], file: &Path) {
    ended.is("sum-a", &sha256(data));
    ended.is("write", "refused");
    assert!(fs::read(file).unwrap() == data, "a read-only disk has changed");
    assert_eq!(ended.counter("first", "writes"), 0);
    assert!(ended.counter("first", "read_bytes") >= data.len() as u64);
}

fn check_written_disk(ended: &Ended, before: &[u8], blocks: u64, file: &Path) {
    const NAME: &str = "a_name_longer_than_a_serial_number";
    let now = fs::read(file).unwrap();
    ended.is("again-b", &ended.fact("sum-b"));
    assert_eq!(sha256(&now[..8 * MIB]), ended.fact("sum-b"), "what was written is not in the file");
    assert!(now[8 * MIB..10 * MIB] == before[8 * MIB..10 * MIB], "what nobody wrote has changed");
    assert!(now[10 * MIB..14 * MIB].iter().all(|byte| *byte == 0), "what was discarded is not zero");
    ended.is("discarded-b", &sha256(&now[10 * MIB..14 * MIB]));
    assert!(now[14 * MIB..] == before[14 * MIB..], "what lies behind the discarded has changed");
    assert!(ended.counter(NAME, "flushes") >= 1 && ended.counter(NAME, "discards") >= 1, "{}", ended.log);
    assert_eq!(ended.counter(NAME, "errors"), 0);
    // Blocks of 512 bytes: the file has given back what was discarded.
    let after = fs::metadata(file).unwrap().blocks();
    assert!(after + (4 << 11) <= blocks, "{blocks} blocks before the discard and {after} after it");
}

#[test]
fn disks_keep_what_is_written_over_mmio() {
    let engines = [IoEngine::Async, IoEngine::Sync, IoEngine::Async];
    disks_keep_what_is_written(Kernel::debian(), Transport::Mmio, engines);
}

#[test]
fn disks_keep_what_is_written_over_pci() {
    let engines = [IoEngine::Sync, IoEngine::Async, IoEngine::Sync];
    disks_keep_what_is_written(Kernel::quick(), Transport::Pci, engines);
}

/// The root device comes first whatever its place in the file, and its parameters with it.
#[test]
fn the_root_device_is_the_first_disk() {
    let mut setup = Setup::new(Kernel::quick(), Transport::Mmio)
        .script("fact first $(cat /sys/block/vda/serial); part cmdline cat /proc/cmdline");
    let [a, b] = ["a", "b"].map(|name| setup.folder().join(name));
    for path in [&a, &b] {
        File::create(path).unwrap().set_len(1 << 20).unwrap();
    }
    setup.spec.drives =
        vec![drive("data", &a), Drive { is_root_device: true, is_read_only: true, ..drive("root", &b) }];
    let ended = setup.start().succeed();
    ended.is("first", "root");
    assert!(ended.part("cmdline").trim().ends_with("root=/dev/vda ro"), "{}", ended.part("cmdline"));
}

/// A disk whose file shrinks under a running machine fails its requests and nothing else.
#[test]
fn a_disk_that_loses_its_end_fails_reads_there_and_the_machine_goes_on() {
    let mut setup = Setup::new(Kernel::quick(), Transport::Pci).script(
        r#"
        echo ready; read line
        dd if=/dev/vda of=/dev/null bs=4096 skip=512 count=1 && fact end read || fact end failed
        fact start $(head -c 4096 /dev/vda | sha256sum | cut -d' ' -f1)
        dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync,notrunc
        "#,
    );
    let path = setup.folder().join("disk");
    let data = random_file(&path, 4, 7);
    setup.spec.drives = vec![drive("disk", &path)];
    let mut vm = setup.start();
    vm.wait_for("ready\n");
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    vm.say("go");
    let ended = vm.succeed();
    ended.is("end", "failed");
    ended.is("start", &sha256(&data[..4096]));
    let mut start = [1; 4096];
    File::open(&path).unwrap().read_exact_at(&mut start, 0).unwrap();
    assert_eq!(start, [0; 4096]);
    assert!(ended.counter("disk", "errors") >= 1);
}
