//! A machine that becomes another one, seen by what runs in its container.

use crate::fixture::{Fixture, LIMIT, shell};
use guest::{
    client::ClientError,
    protocol::{
        FailureKind, Identity, Interface, InterfaceIdentity, Open, Outcome, Part, Reply, Request, VERSION,
        frame,
    },
};
use std::io::Write;

fn named(name: &str) -> Identity {
    Identity { hostname: Some(name.into()), ..Identity::default() }
}

fn lo(addresses: &[&str]) -> InterfaceIdentity {
    let addresses = addresses.iter().map(|a| (*a).to_owned()).collect();
    InterfaceIdentity { name: "lo".into(), addresses, ..InterfaceIdentity::default() }
}

fn done(part: Part) -> Outcome {
    Outcome { part, failure: None }
}

#[test]
fn a_running_container_sees_its_new_name_and_machine_id() {
    let mut f = Fixture::running();
    let before =
        f.run(shell("touch /etc/machine-id; chmod 444 /etc/machine-id; echo 10.9.9.9 mine >> /etc/hosts"));
    assert_eq!(before.0, 0, "{before:?}");
    let id = "0123456789abcdef0123456789abcdef";
    let identity = Identity { machine_id: Some(id.into()), ..named("clone-7") };
    for _ in 0..2 {
        let outcomes = f.agent.identify(identity.clone()).unwrap();
        assert_eq!(outcomes, [done(Part::Hostname), done(Part::MachineId)]);
    }
    let (_, out, err) = f.run(shell(
        "hostname; cat /etc/hostname /etc/machine-id; grep -c box /etc/hosts; grep clone-7 /etc/hosts; \
         grep mine /etc/hosts; echo $HOSTNAME",
    ));
    let expected = format!("clone-7\nclone-7\n{id}\n0\n127.0.1.1\tclone-7\n10.9.9.9 mine\nclone-7\n");
    assert_eq!(out, expected, "{err}");
}

#[test]
fn a_machine_that_was_saved_before_its_command_started_is_renamed_too() {
    let mut f = Fixture::ready(|_| ());
    assert_eq!(f.agent.identify(named("late")).unwrap(), [done(Part::Hostname)]);
    f.agent.start(shell("hostname; cat /etc/hostname; grep -c late /etc/hosts")).unwrap();
    let mut agent = f.machine.control().unwrap();
    let (_, out, err) = f.finish(&mut agent, guest::protocol::MAIN);
    assert_eq!(out, "late\nlate\n1\n", "{err}");
}

#[test]
fn an_interface_has_the_new_addresses_and_no_others() {
    let mut f = Fixture::ready(|s| {
        let addresses = vec!["127.0.0.1/8".into(), "10.77.0.2/24".into(), "fd00:77::2/64".into()];
        s.network = vec![Interface { name: "lo".into(), addresses, ..Interface::default() }];
    });
    f.agent.start(shell("echo ready; sleep 1000")).unwrap();
    let network = vec![lo(&["127.0.0.1/8", "10.77.0.3/24", "fd00:77::3/64"])];
    let identity = Identity { network, ..Identity::default() };
    for _ in 0..2 {
        let outcomes = f.agent.identify(identity.clone()).unwrap();
        assert_eq!(outcomes, [done(Part::Interface("lo".into()))]);
    }
    let look = "ip -o address show dev lo | awk '{print $4}' | sort; grep -c '^10.77.0.3.box$' /etc/hosts; \
                grep -c 10.77.0.2 /etc/hosts";
    let (_, out, err) = f.run(shell(look));
    assert_eq!(out, "10.77.0.3/24\n127.0.0.1/8\nfd00:77::3/64\n1\n0\n", "{err}");
}

#[test]
fn a_card_has_the_new_hardware_address_and_what_follows_from_it() {
    let mut f = Fixture::running();
    let make = "ip link add v0 type veth peer name v1 && ip link set v0 address 02:fc:00:00:00:01 && \
                sysctl -qw net.ipv6.conf.v0.accept_dad=0 net.ipv6.conf.v1.accept_dad=0; \
                ip link set v0 up && ip link set v1 up && ip address add 10.78.0.2/24 dev v0 && \
                ip route add default via 10.78.0.1 && ip -6 -o address show dev v0 | grep -c fe80::fc:ff:fe00:1/64";
    let (code, out, err) = f.run(shell(make));
    assert_eq!((code, out.as_str()), (0, "1\n"), "{err}");
    let card = InterfaceIdentity {
        mac: "02:fc:00:00:00:01".into(),
        new_mac: Some("02:fc:00:00:00:02".into()),
        addresses: vec!["10.78.5.9/24".into()],
        gateways: vec!["10.78.5.1".into()],
        ..InterfaceIdentity::default()
    };
    let identity = Identity { network: vec![card], ..Identity::default() };
    for _ in 0..2 {
        let outcomes = f.agent.identify(identity.clone()).unwrap();
        assert_eq!(outcomes, [done(Part::Interface("02:fc:00:00:00:01".into()))]);
    }
    let look = "cat /sys/class/net/v0/address; ip -o address show dev v0 | awk '{print $4}' | sort; \
                ip route show default | awk '{print $3}'";
    let (_, out, err) = f.run(shell(look));
    assert_eq!(out, "02:fc:00:00:00:02\n10.78.5.9/24\nfe80::fc:ff:fe00:2/64\n10.78.5.1\n", "{err}");
}

#[test]
fn what_cannot_be_done_is_told_and_the_rest_is_done() {
    let mut f = Fixture::running();
    let absent = InterfaceIdentity { name: "nosuch0".into(), ..InterfaceIdentity::default() };
    let identity = Identity {
        unix_ns: Some(1),
        entropy: vec![7; 32],
        network: vec![absent, lo(&["127.0.0.1/8"])],
        ..named("other")
    };
    let outcomes = f.agent.identify(identity).unwrap();
    let told: Vec<_> = outcomes.iter().map(|o| (&o.part, o.failure.as_ref().map(|f| f.kind))).collect();
    let (absent, lo) = (Part::Interface("nosuch0".into()), Part::Interface("lo".into()));
    // The host's clock and random numbers are not the test's to change.
    assert_eq!(
        told,
        [
            (&Part::Random, Some(FailureKind::WrongState)),
            (&Part::Clock, Some(FailureKind::WrongState)),
            (&Part::Hostname, None),
            (&absent, Some(FailureKind::System)),
            (&lo, None),
        ]
    );
    assert_eq!(f.run(shell("hostname")).1, "other\n");
}

#[test]
fn what_could_not_be_meant_changes_nothing() {
    let mut f = Fixture::running();
    let wrong = [
        named(""),
        named("a/b"),
        Identity { machine_id: Some("x".into()), ..named("no") },
        Identity { entropy: vec![0; 600], ..named("no") },
        Identity { network: vec![InterfaceIdentity::default()], ..named("no") },
        Identity { network: vec![lo(&["127.0.0.1"])], ..named("no") },
        Identity { network: vec![lo(&[]); 65], ..named("no") },
    ];
    for identity in wrong {
        match f.agent.identify(identity) {
            Err(ClientError::Agent(failure)) => assert_eq!(failure.kind, FailureKind::BadRequest),
            other => panic!("{other:?}"),
        }
    }
    let mut stream = guest::client::connect(&f.uds, 1024, LIMIT).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    frame::write(&mut stream, &Open::Control { version: VERSION }).unwrap();
    let _: Reply = frame::read(&mut stream).unwrap();
    for text in [r#"{"identify":{"colour":1}}"#, r#"{"identify":{"unix_ns":-1}}"#, r#"{"identify":null}"#] {
        let length = u32::try_from(text.len()).unwrap().to_le_bytes();
        stream.write_all(&[&length, text.as_bytes()].concat()).unwrap();
        let reply: Reply = frame::read(&mut stream).unwrap();
        assert!(matches!(&reply, Reply::Failed(f) if f.kind == FailureKind::BadRequest), "{reply:?}");
    }
    // Nothing asked for, nothing done.
    frame::write(&mut stream, &Request::Identify(Box::default())).unwrap();
    let reply: Reply = frame::read(&mut stream).unwrap();
    assert_eq!(reply, Reply::Identified(Vec::new()));
    assert_eq!(f.run(shell("hostname")).1, "box\n");
}
