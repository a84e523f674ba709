"""Drives a monitor through `Api` of firecracker-python, one step of a test at a time.

    api.py SOCKET TOLD

TOLD is what differs from test to test, as JSON. Each line of standard input names a step and is
answered by itself when that is done. A request that the client takes for failed ends this
program with its exception.
"""

import json
import sys

from firecracker.api import Api
from firecracker.exceptions import APIError


def refused(call, reason, **body):
    """What must not be accepted, and the word that the answer names it by."""
    try:
        call(**body)
    except APIError as error:
        assert reason in str(error), error
    else:
        raise AssertionError(f"{body} was accepted")


def state(api):
    return api.describe.get().json()["state"]


def configure(api, told):
    assert state(api) == "Not started"
    assert api.version.get().json()["firecracker_version"] == told["version"]
    api.logger.put(log_path=told["log"], level="Info", show_level=True, show_log_origin=False)
    api.boot.put(kernel_image_path=told["kernel"], initrd_path=told["initrd"], boot_args=told["boot_args"])
    refused(api.machine_config.put, "vcpu_count", vcpu_count=0, mem_size_mib=256)
    api.machine_config.put(vcpu_count=1, mem_size_mib=256)
    api.machine_config.patch(vcpu_count=2)
    assert api.machine_config.get().json()["vcpu_count"] == 2
    api.drive.put(drive_id="data", path_on_host=told["disk"], is_root_device=False, is_read_only=True)
    api.network.put(iface_id="eth0", host_dev_name=told["tap"], guest_mac=told["mac"])
    api.mmds_config.put(version="V1", network_interfaces=["eth0"])
    api.mmds.put(name="first", kept="yes")
    refused(api.vm.patch, "start", state="Paused")
    api.actions.put(action_type="InstanceStart")
    refused(api.boot.put, "start", kernel_image_path=told["kernel"])


def change(api, _told):
    api.mmds.patch(name="second")
    assert api.mmds.get().json() == {"name": "second", "kept": "yes"}
    assert state(api) == "Running"
    api.vm.patch(state="Paused")
    assert state(api) == "Paused"
    api.vm.patch(state="Resumed")
    assert state(api) == "Running"
    api.network.patch(
        iface_id="eth0", rx_rate_limiter={"bandwidth": {"size": 1 << 30, "refill_time": 100}}
    )
    config = api.vm_config.get().json()
    assert config["drives"][0]["drive_id"] == "data", config
    assert config["network-interfaces"][0]["iface_id"] == "eth0", config
    assert config["machine-config"]["mem_size_mib"] == 256, config


def end(api, _told):
    api.actions.put(action_type="SendCtrlAltDel")


if __name__ == "__main__":
    client, told = Api(sys.argv[1]), json.loads(sys.argv[2])
    for line in sys.stdin:
        {"configure": configure, "change": change, "end": end}[line.strip()](client, told)
        print(line, end="", flush=True)
