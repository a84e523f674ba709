//! Flags of `nacelle run`, and what an image says about running it.

use std::{fs, process::Command};

use serde_json::json;

use super::{
    host::{Ended, Host, LIMIT, Running, SMALL, noise, test_image},
    image::{Image, Layer, digest},
};

#[test]
fn environment_directory_user_and_host_name_are_as_asked() {
    let host = Host::new();
    let file = host.dir().join("env");
    fs::write(&file, "# a comment\nFROM_FILE=1 2\n\nPASSED_ON\nTWICE=file\n").unwrap();
    let flags = [
        "-e",
        "GIVEN=a=b c",
        "-e",
        "INHERITED",
        "-e",
        "ABSENT",
        "--env-file",
        file.to_str().unwrap(),
        "-e",
        "TWICE=flag",
        "-w",
        "/var/new place",
        "-u",
        "www-data",
        "--hostname",
        "box.example",
    ];
    let script = "echo \"$GIVEN|$INHERITED|${ABSENT-unset}|$FROM_FILE|$PASSED_ON|$TWICE\"; pwd; id -un; id -g; hostname; \
                  cat /etc/hostname; echo $HOME; grep box.example /etc/hosts | wc -l";
    let image = test_image();
    let line = [&["run", "-q"], &SMALL[..], &flags, &[&image, "sh", "-c", script]].concat();
    let mut command = host.command(&line);
    command.env("INHERITED", "from outside").env("PASSED_ON", "as well");
    let ended = Running::start(command, None).end(LIMIT).expect(0);
    assert_eq!(
        ended.text(),
        "a=b c|from outside|unset|1 2|as well|flag\n/var/new place\nwww-data\n33\nbox.example\nbox.example\n/var\n1\n"
    );
}

#[test]
fn a_user_may_be_a_number_and_one_that_is_not_there_is_named() {
    let host = Host::new();
    assert_eq!(host.run(&["-u", "1234:56"], "id -u; id -g").expect(0).text(), "1234\n56\n");
    let ended = host.run(&["-u", "nosuchuser"], "id");
    assert!(ended.code == 125 || ended.code == 126, "{}", ended.code);
    ended.says(&["nosuchuser"]);
    host.assert_nothing_left();
}

#[test]
fn memory_and_processors_are_what_the_guest_sees() {
    let host = Host::new();
    let image = test_image();
    let script = "nproc; awk '/MemTotal/{print int($2/1024)}' /proc/meminfo";
    let run = |flags: &[&str]| {
        let ended = host.nacelle(&[&["run", "-q"], flags, &[&image, "sh", "-c", script]].concat()).expect(0);
        let numbers: Vec<u64> = ended.text().lines().map(|line| line.parse().unwrap()).collect();
        (numbers[0], numbers[1])
    };
    let (cpus, memory) = run(&["-m", "320M", "--cpus", "3"]);
    assert!(cpus == 3 && (240..=320).contains(&memory), "{cpus} {memory}");
    let (cpus, memory) = run(&["--memory", "128m", "-c", "1", "--pci"]);
    assert!(cpus == 1 && (64..=128).contains(&memory), "{cpus} {memory}");
}

#[test]
fn a_read_only_root_refuses_writes_and_memory_file_systems_take_them() {
    let host = Host::new();
    let flags = ["--read-only", "--tmpfs", "/scratch:size=1M,mode=750", "--tmpfs", "/fixed:ro"];
    let script = "touch /x 2>/dev/null || echo refused; touch /fixed/x 2>/dev/null || echo refused; \
                  touch /scratch/x && echo taken; stat -c %a /scratch; \
                  head -c 3000000 /dev/zero >/scratch/big 2>/dev/null || echo full; grep -c ' / ' /proc/mounts";
    assert_eq!(host.run(&flags, script).expect(0).text(), "refused\nrefused\ntaken\n750\nfull\n1\n");
    // Without the flag the root is written and the image stays as it is.
    host.run(&[], "echo changed >/etc/passwd && rm /bin/ls && echo x >/bin/new").expect(0);
    host.run(&[], "grep -q root /etc/passwd && ls /bin/ls && ! ls /bin/new").expect(0);
}

#[test]
fn the_writable_layer_is_as_large_as_asked() {
    let host = Host::new();
    let script = "df -m / | awk 'END{print ($2 > 20 && $2 <= 64)}'; head -c 100000000 /dev/zero >/x || echo full; rm /x; \
                  echo y >/y && cat /y";
    assert_eq!(host.run(&["--storage", "64M"], script).expect(0).text(), "1\nfull\ny\n");
}

#[test]
fn a_mounted_disk_keeps_what_was_written_for_the_host_to_read() {
    let host = Host::new();
    let disk = host.dir().join("disk.img");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    tool(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&disk));
    let bytes = noise(3 << 20);
    let flag = format!("{}:/mnt", disk.display());
    host.start(&["-i", "--disk", &flag], "cat >/mnt/data && mkdir /mnt/d", Some(bytes.clone()))
        .end(LIMIT)
        .expect(0);
    // The file system is whole, and its file is the one that was written.
    tool(Command::new("e2fsck").args(["-f", "-n"]).arg(&disk));
    let copy = host.dir().join("copy");
    tool(Command::new("debugfs").args(["-R", &format!("dump /data {}", copy.display())]).arg(&disk));
    assert_eq!(digest(&fs::read(&copy).unwrap()), digest(&bytes));
    // A second machine sees it, and does not change it when it may not.
    let before = digest(&fs::read(&disk).unwrap());
    let script = "sha256sum </mnt/data; touch /mnt/new 2>/dev/null || echo refused";
    let ended = host.run(&["--disk", &format!("{flag}:ro")], script).expect(0);
    assert_eq!(ended.text(), format!("{}  -\nrefused\n", &digest(&bytes)[7..]));
    assert_eq!(digest(&fs::read(&disk).unwrap()), before);
}

#[test]
fn disks_without_a_place_are_raw_devices() {
    let host = Host::new();
    let (one, two) = (host.dir().join("one.img"), host.dir().join("two.img"));
    let bytes = noise(2 << 20);
    fs::write(&one, &bytes).unwrap();
    fs::write(&two, vec![0; 2 << 20]).unwrap();
    // Root and writable layer are the first two.
    let script = "dd if=/dev/vdc of=/dev/vdd bs=64k conv=fsync 2>/dev/null; echo $?; dd if=/dev/zero of=/dev/vdc count=1 \
                  conv=fsync 2>/dev/null || echo refused";
    let flags = ["--disk", &format!("{}:ro", one.display()), "--disk", two.to_str().unwrap()];
    assert_eq!(host.run(&flags, script).expect(0).text(), "0\nrefused\n");
    assert_eq!(digest(&fs::read(&two).unwrap()), digest(&bytes));
    assert_eq!(digest(&fs::read(&one).unwrap()), digest(&bytes));
}

#[test]
fn what_an_image_says_counts_unless_flags_say_otherwise() {
    let host = Host::with_own_cache();
    let image = Image::busybox()
        .layer(Layer::new().file("etc/motd", 0o644, b"hello from a second layer\n").file(
            "bin/.wh.wget",
            0o644,
            b"",
        ))
        .setting("Env", json!(["PATH=/bin", "COLOR=blue", "SHAPE=round"]))
        .setting("WorkingDir", json!("/srv"))
        .setting("User", json!("nobody"))
        .setting("Entrypoint", json!(["sh", "-c", "echo entry $COLOR $SHAPE $(pwd) $(id -un) $0 $1"]))
        .setting("Cmd", json!(["given", "by-image"]))
        .layout(&host.dir().join("layout"));
    let run = |flags: &[&str], command: &[&str]| -> Ended {
        host.nacelle(&[&["run", "-q"], &SMALL[..], flags, &[&image], command].concat()).expect(0)
    };
    assert_eq!(run(&[], &[]).text(), "entry blue round /srv nobody given by-image\n");
    assert_eq!(
        run(&["-e", "COLOR=red", "-u", "0", "-w", "/"], &["by", "caller"]).text(),
        "entry red round / root by caller\n"
    );
    let shown = run(&["--entrypoint", "cat"], &["/etc/motd"]);
    assert_eq!(shown.text(), "hello from a second layer\n");
    // Flags end at the image.
    assert_eq!(run(&["--entrypoint", "sh"], &["-c", "! test -e /bin/wget && echo gone"]).text(), "gone\n");
    host.assert_nothing_left();
}

fn tool(command: &mut Command) {
    let output = command.output().expect("the tool is installed");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&said));
}
