//! What every virtio device has to stand, on both transports.
//!
//! ```text
//!   kinds.rs     one entry a device: how to make it, and one request that it must answer
//!   plugged.rs   a device in a transport on a test bench, with a software driver
//!   main.rs      the life every device must be able to lead
//!   hostile.rs   what guests must not be able to do to it
//! ```
//!
//! A new device is one entry in `kinds.rs`.

mod hostile;
mod kinds;
mod plugged;

use devices::virtio::{F_COMMON, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, core::status, driver::memory};

use crate::{
    kinds::kinds,
    plugged::{Plugged, TRANSPORTS},
};

/// Runs `f` for every device in every transport.
fn each(f: impl Fn(Plugged)) {
    for kind in kinds() {
        for transport in TRANSPORTS {
            println!("{} over {transport:?}", kind.name);
            f(Plugged::new(&kind, transport, memory(&[(0, 4 << 20)])));
        }
    }
}

#[test]
fn every_device_offers_the_modern_interface_and_says_so_consistently() {
    each(|plugged| {
        let about = plugged.transport.about().clone();
        assert_eq!(about.features & F_COMMON, F_COMMON);
        assert_eq!(plugged.face.features(), about.features);
        for (index, size) in (0..).zip(&about.queues) {
            assert_eq!(plugged.face.queue_max(index), *size);
            assert!(size.is_power_of_two() && *size <= devices::limits::QUEUE_SIZE_MAX);
        }
        assert_eq!(plugged.face.queue_max(about.queues.len() as u16), 0);
        assert!(plugged.bench.doorbells().is_empty(), "nothing is wired before a driver is there");
    });
}

#[test]
fn every_device_answers_with_each_set_of_common_features() {
    each(|mut plugged| {
        let own = plugged.transport.about().features & !F_COMMON;
        for common in [0, F_EVENT_IDX, F_INDIRECT_DESC, F_EVENT_IDX | F_INDIRECT_DESC] {
            for own in [own, 0] {
                plugged.up_with(own | common | F_VERSION_1);
                plugged.talk();
                plugged.talk();
            }
        }
    });
}

#[test]
fn every_device_starts_stops_saves_restores_and_starts_again() {
    each(|mut plugged| {
        plugged.up();
        plugged.talk();
        for _ in 0..3 {
            plugged.transport.pause().unwrap();
            plugged.transport.resume().unwrap();
            plugged.talk();
        }
        plugged.transport.pause().unwrap();
        let config = plugged.config();
        // Until a limiter has its tokens back, which come in a paused machine too.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let saved = plugged.transport.save().unwrap();
        assert_eq!(plugged.transport.save().unwrap(), saved, "saving changes nothing");
        let mut other = plugged.successor();
        other.transport.restore(&saved).unwrap();
        assert_eq!(other.transport.save().unwrap()[0], saved[0]);
        other.transport.resume().unwrap();
        assert_eq!(other.face.status(), 0xf);
        assert_eq!(other.config(), config);
        other.talk();
        other.up();
        other.talk();
    });
}

#[test]
fn a_request_made_while_the_machine_was_paused_is_answered_after_it() {
    each(|mut plugged| {
        plugged.up();
        plugged.transport.pause().unwrap();
        plugged.ask();
        plugged.transport.resume().unwrap();
        plugged.hear();
    });
}

#[test]
fn every_device_can_be_reset_twice_and_at_every_step() {
    each(|mut plugged| {
        for step in [0, 1, 3, 0xb, 0xf] {
            for rung in [1, 3, 0xb, 0xf].into_iter().take_while(|rung| *rung <= step) {
                if rung == 0xb {
                    plugged.face.accept(F_VERSION_1);
                }
                plugged.face.set_status(rung);
            }
            // Some devices refuse to start without their queues.
            assert_eq!(plugged.face.status() & !status::NEEDS_RESET, step);
            plugged.face.set_status(0);
            plugged.face.set_status(0);
            assert_eq!(plugged.face.status(), 0);
        }
        plugged.up();
        plugged.talk();
        plugged.face.set_status(0);
        plugged.face.set_status(0);
        assert!(plugged.bench.doorbells().is_empty());
        plugged.up();
        plugged.talk();
    });
}

#[test]
fn configuration_reads_end_where_the_configuration_ends() {
    each(|plugged| {
        let len = u64::from(plugged.transport.about().config_len);
        for size in [1usize, 2, 4, 8] {
            for offset in 0..len + 16 {
                let mut data = [0u8; 8];
                plugged.face.read_config(offset, &mut data[..size]);
                let beyond = data[..size].iter().zip(offset..).filter(|(_, at)| *at >= len);
                assert!(beyond.into_iter().all(|(byte, _)| *byte == 0xff), "{offset}+{size}");
            }
        }
    });
}

#[test]
fn a_machine_without_a_driver_can_be_paused_saved_and_restored() {
    each(|plugged| {
        plugged.transport.pause().unwrap();
        let saved = plugged.transport.save().unwrap();
        let mut other = plugged.successor();
        other.transport.restore(&saved).unwrap();
        other.transport.resume().unwrap();
        assert_eq!(other.face.status(), 0);
        other.up();
        other.talk();
    });
}

#[test]
fn damaged_saved_states_are_refused_or_harmless() {
    each(|mut plugged| {
        plugged.up();
        plugged.talk();
        plugged.transport.pause().unwrap();
        let saved = plugged.transport.save().unwrap();
        let mut other = plugged.successor();
        for section in 0..saved.len() {
            let mut without = saved.clone();
            without.remove(section);
            assert!(other.transport.restore(&without).is_err(), "section {section} was not missed");
            for byte in 0..saved[section].bytes.len() {
                let mut damaged = saved.clone();
                damaged[section].bytes[byte] ^= 0xff;
                if other.transport.restore(&damaged).is_ok() {
                    let _ = other.transport.resume();
                    let _ = other.transport.pause();
                }
            }
            let mut newer = saved.clone();
            newer[section].version = 999;
            assert!(other.transport.restore(&newer).is_err());
        }
        other.transport.restore(&saved).unwrap();
        other.transport.resume().unwrap();
        assert_eq!(other.face.status() & !status::NEEDS_RESET, 0xf);
        other.recover();
        other.talk();
    });
}
