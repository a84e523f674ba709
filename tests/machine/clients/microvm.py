"""Runs one machine with `MicroVM` of firecracker-python, from its tap to its removal.

    microvm.py FOLDER PROGRAM KERNEL INITRD DISK ADDRESS CALLS

FOLDER gets the machine's files, PROGRAM is what the package starts, and CALLS is the socket of
who serves the guest's calls to port 6000. The console goes to standard output.

The package looks for a Docker daemon, an address of this host in the internet, a default route
and nftables, none of which a machine needs. Those four are given to it here; what it says to
the monitor is its own.
"""

import functools
import os
import subprocess
import sys
import threading
import time

from firecracker import config, microvm

PATIENCE = 120


class Firewall:
    """Takes every rule and has none."""

    def json_cmd(self, _command):
        return 0, {"nftables": []}, ""

    def cmd(self, _command):
        return 0, "", ""


def prepare(folder, program):
    """Gives the package its places, and what it finds on hosts of its own."""
    places = {"data_path": folder, "snapshot_path": f"{folder}/snapshots", "binary_path": program}
    config.MicroVMConfig.__init__ = functools.partialmethod(config.MicroVMConfig.__init__, **places)
    microvm.docker.from_env = lambda: None
    microvm.get_public_ip = lambda: "192.0.2.1"
    microvm.NetworkManager.get_interface_name = lambda _self: "eth0"


def wait_for(path, word):
    deadline = time.monotonic() + PATIENCE
    while True:
        with open(path, encoding="utf-8", errors="replace") as console:
            text = console.read().replace("\r", "")
        if word in text:
            return text
        assert time.monotonic() < deadline, f"no {word!r} in\n{text}"
        time.sleep(0.1)


def main(folder, program, kernel, initrd, disk, address, calls):
    prepare(folder, program)
    machine = microvm.MicroVM(
        name="machine", kernel_file=kernel, initrd_file=initrd, base_rootfs=disk, vcpu=2, memory="384M",
        ip_addr=address, mmds_enabled=True, user_data="told by a file", vsock_enabled=True,
        vsock_guest_cid=54, labels={"kind": "test"},
    )  # fmt: skip
    name = machine._microvm_id
    for network in [machine._network, machine._vmm._network]:
        network._nft = Firewall()
    os.makedirs(folder, exist_ok=True)
    said = machine.create()
    assert said == f"VMM {name} created", said
    # The package makes this folder itself, and only once.
    os.symlink(calls, f"{folder}/{name}/v.sock_6000")
    try:
        drive(machine, name, f"{folder}/{name}/firecracker.log")
    finally:
        subprocess.run(["ip", "link", "del", f"tap_{name}"], capture_output=True, check=False)


def drive(machine, name, console):
    pid, _ = machine._process.get_pid(name)
    ends = []
    waiting = threading.Thread(target=lambda: ends.append(os.waitpid(pid, 0)[1]), daemon=True)
    waiting.start()
    wait_for(console, "@step=ready\n")
    assert [found["id"] for found in microvm.MicroVM.list()] == [name]
    assert machine.find(state="Running", labels={"kind": "test"})[0]["id"] == name
    machine.pause()
    assert machine._vmm.get_vmm_state(name) == "Paused"
    machine.resume()
    assert machine._vmm.get_vmm_state(name) == "Running"
    told = machine.config()
    assert told["machine-config"]["vcpu_count"] == 2, told
    assert told["vsock"]["guest_cid"] == 54, told
    assert machine._vmm.get_vmm_ip_addr(name) == machine._ip_addr
    print(wait_for(console, "@step=last\n"), flush=True)
    said = machine.delete()
    assert said == f"VMM {name} is deleted", said
    waiting.join(PATIENCE)
    print(f"@own={name}\n@status={os.waitstatus_to_exitcode(ends[0])}")
    assert not os.path.exists(os.path.dirname(console))


if __name__ == "__main__":
    main(*sys.argv[1:])
