//! What a well-behaved guest gets.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use serde_json::json;
use smoltcp::{
    socket::tcp::State,
    wire::{IpAddress, IpCidr, Ipv4Address},
};

use super::guest::{Guest, MAC, parts, service};
use crate::mmds::{Detour, Mmds, MmdsConfig, MmdsError, MmdsVersion, wire};

#[test]
fn a_guest_asks_for_a_token_and_reads_with_it() {
    let mut guest = Guest::new(MmdsVersion::V2);
    assert_eq!(guest.ask("GET /latest/meta-data/ami-id HTTP/1.1").0, 401);
    let (status, token) = guest.ask("PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 60");
    assert_eq!(status, 200);
    let get = |path: &str| format!("GET {path} HTTP/1.1\nX-metadata-token: {token}");
    assert_eq!(guest.ask(&get("/latest/meta-data/ami-id")), (200, "ami-1".to_owned()));
    assert_eq!(guest.ask(&get("/latest/meta-data/")), (200, "ami-id\nnet/".to_owned()));
    let json = format!("{}\nAccept: application/json", get("/latest/meta-data"));
    assert_eq!(guest.ask(&json), (200, r#"{"ami-id":"ami-1","net":{"mac":"x"}}"#.to_owned()));
    guest.pass(Duration::from_secs(61));
    assert_eq!(guest.ask(&get("/latest")).0, 401, "it expired");
    assert_eq!((guest.count("connections_created"), guest.count("connections_destroyed")), (6, 6));
    assert_eq!(guest.count("rx_accepted_err") + guest.count("tx_errors"), 0);
}

#[test]
fn a_change_by_the_host_is_seen_by_the_next_request() {
    let mut guest = Guest::new(MmdsVersion::V1);
    guest.mmds.patch(json!({"latest": {"meta-data": {"ami-id": "ami-2"}}})).unwrap();
    assert_eq!(guest.ask("GET /latest/meta-data/ami-id HTTP/1.1").1, "ami-2");
}

#[test]
fn ten_connections_at_once_are_all_served() {
    let mut guest = Guest::new(MmdsVersion::V1);
    let handles: Vec<_> = (0..10).map(|_| guest.connect()).collect();
    for handle in &handles {
        guest.say(*handle, "GET /big HTTP/1.1\r\n");
    }
    for handle in handles.iter().rev() {
        guest.say(*handle, "\r\n");
    }
    for handle in handles {
        let (status, body) = parts(&guest.hear(handle));
        assert_eq!((status, body.len()), (200, 50_000));
    }
}

#[test]
fn one_connection_answers_many_requests_in_order() {
    let mut guest = Guest::new(MmdsVersion::V1);
    let handle = guest.connect();
    guest.say(handle, &"GET /latest/meta-data/ami-id HTTP/1.1\r\n\r\n".repeat(50));
    let answers = guest.hear(handle);
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 50);
    assert!(answers.ends_with("ami-1"));
    for byte in "GET /latest HTTP/1.1\r\n\r\n".chars() {
        guest.say(handle, &byte.to_string());
    }
    assert_eq!(parts(&guest.hear(handle)), (200, "meta-data/".to_owned()));
    assert_eq!(guest.count("connections_created"), 1);
}

#[test]
fn a_connection_is_closed_where_the_guest_expects_it() {
    let mut guest = Guest::new(MmdsVersion::V1);
    for request in ["GET /latest HTTP/1.0\r\n\r\n", "GET /latest HTTP/1.1\r\nConnection: close\r\n\r\n"] {
        let handle = guest.connect();
        guest.say(handle, request);
        assert!(guest.hear(handle).contains("Connection: close\r\n"));
        assert_eq!(guest.socket(handle).state(), State::CloseWait);
        guest.socket(handle).close();
        guest.run();
        assert_eq!(guest.socket(handle).state(), State::Closed);
    }
}

#[test]
fn a_guest_that_ends_its_side_first_is_still_answered() {
    let mut guest = Guest::new(MmdsVersion::V1);
    let handle = guest.connect_with(2000);
    guest.socket(handle).send_slice(b"GET /big HTTP/1.1\r\n\r\n").unwrap();
    guest.socket(handle).close();
    guest.run();
    assert_eq!(parts(&guest.hear(handle)).1.len(), 50_000);
    assert!(!guest.socket(handle).is_active());
    assert_eq!(guest.count("connections_destroyed"), 1);
}

#[test]
fn what_the_guest_loses_is_sent_again() {
    let mut guest = Guest::new(MmdsVersion::V1);
    let mut frames = 0;
    guest.lose = Box::new(move |_| {
        frames += 1;
        frames % 3 == 0
    });
    let handle = guest.connect();
    guest.pass(Duration::from_secs(5));
    guest.say(handle, "GET /big HTTP/1.1\r\n\r\n");
    let mut answer = String::new();
    for _ in 0..60 {
        answer += &guest.hear(handle);
        guest.pass(Duration::from_secs(1));
    }
    assert_eq!(parts(&answer).1.len(), 50_000);
}

#[test]
fn a_guest_without_a_route_is_answered_through_its_gateway() {
    let address = IpCidr::new(IpAddress::v4(10, 0, 0, 2), 24);
    let mut guest = Guest::with(service(MmdsVersion::V1), address);
    guest.gateway(Ipv4Address::new(10, 0, 0, 1));
    let handle = guest.connect();
    // It asks for its gateway, which the service has nothing to do with.
    let asked = guest.log.pop().unwrap();
    assert_eq!(asked[12..14], [8, 6]);
    assert!(!guest.detour.is_for_mmds(&asked));
    let mut reply = MAC.to_vec();
    reply.extend_from_slice(&[2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    reply.extend_from_slice(&[2, 0, 0, 0, 0, 1, 10, 0, 0, 1]);
    reply.extend_from_slice(&[2, 0, 0, 0, 0, 7, 10, 0, 0, 2]);
    guest.hears(reply);
    guest.run();
    guest.pass(Duration::from_secs(2));
    guest.say(handle, "GET /latest HTTP/1.1\r\n\r\n");
    assert_eq!(parts(&guest.hear(handle)), (200, "meta-data/".to_owned()));
    let last = guest.log.last().unwrap();
    assert_eq!(last[..6], [2, 0, 0, 0, 0, 1], "sent to the gateway");
}

#[test]
fn another_address_is_served_and_the_usual_one_left_alone() {
    let mmds = Mmds::new(1000).unwrap();
    let address = Ipv4Addr::new(169, 254, 170, 2);
    mmds.configure(MmdsConfig { address, ..MmdsConfig::for_interface("a") }, &["a", "b"]).unwrap();
    let detour = Detour::new(Arc::new(mmds)).unwrap();
    let mut frame = [0; 60];
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[30..34].copy_from_slice(&[169, 254, 169, 254]);
    assert!(!detour.is_for_mmds(&frame));
    frame[30..34].copy_from_slice(&address.octets());
    assert!(detour.is_for_mmds(&frame));
}

#[test]
fn a_configuration_that_cannot_work_is_refused() {
    let mmds = Mmds::new(1000).unwrap();
    let one = MmdsConfig::for_interface("eth0");
    for address in [[169, 254, 0, 1], [169, 254, 255, 1], [10, 0, 0, 1], [169, 253, 1, 1], [0; 4]] {
        let config = MmdsConfig { address: address.into(), ..one.clone() };
        assert!(matches!(mmds.configure(config, &["eth0"]), Err(MmdsError::Address(_))), "{address:?}");
    }
    assert!(matches!(mmds.configure(one.clone(), &["eth1"]), Err(MmdsError::UnknownInterface(_))));
    let none = MmdsConfig { interfaces: Vec::new(), ..one.clone() };
    assert!(matches!(mmds.configure(none, &["eth0"]), Err(MmdsError::NoInterface)));
    assert!(mmds.config().interfaces.is_empty(), "nothing was changed");
    mmds.configure(one.clone(), &["eth1", "eth0"]).unwrap();
    assert_eq!(*mmds.config(), one);
}

#[test]
fn the_timer_fires_by_itself_when_a_reply_goes_unanswered() {
    let mut guest = Guest::new(MmdsVersion::V1);
    let handle = guest.connect();
    guest.lose = Box::new(|_| true);
    guest.say(handle, "GET /latest HTTP/1.1\r\n\r\n");
    let mut poll = libc::pollfd { fd: guest.detour.timer(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one element, which outlives the call.
    let mut is_ready = |wait| unsafe { libc::poll(&raw mut poll, 1, wait) } == 1;
    assert!(is_ready(5000));
    guest.detour.tick(std::time::Instant::now() + Duration::from_secs(3));
    assert!(!is_ready(0), "a tick makes it silent");
    assert!(guest.detour.has_reply(), "the reply is repeated");
}

#[test]
fn replies_come_from_the_services_own_hardware_address() {
    let mut guest = Guest::new(MmdsVersion::V1);
    guest.lose = Box::new(|frame| {
        assert_eq!(frame[6..12], wire::MAC);
        assert_eq!(frame[..6], MAC);
        false
    });
    assert_eq!(guest.ask("GET /latest HTTP/1.1").0, 200);
    assert!(guest.run().is_empty(), "nothing else was ever sent");
}
