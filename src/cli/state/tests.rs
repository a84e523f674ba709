use super::*;

fn state() -> (tempfile::TempDir, State) {
    let dir = tempfile::tempdir().unwrap();
    let state = State::at(dir.path().join("state")).unwrap();
    (dir, state)
}

#[test]
fn machines_are_found_by_name_id_and_unique_start() {
    let (_dir, state) = state();
    state.create(Record::example("aaaa11", "one")).unwrap();
    state.create(Record::example("aaaa22", "two")).unwrap();
    assert_eq!(state.find("two").unwrap().record.id, "aaaa22");
    assert_eq!(state.find("aaaa1").unwrap().record.name, "one");
    assert_eq!(state.find("aaaa11").unwrap().record.name, "one");
    let several = state.find("aaaa").unwrap_err().message;
    assert!(several.contains("one") && several.contains("two"), "{several}");
    assert!(state.find("twoo").unwrap_err().message.contains("did you mean two?"));
    assert!(state.find("").is_err());
}

#[test]
fn a_name_belongs_to_one_machine_until_it_is_removed() {
    let (_dir, state) = state();
    let first = state.create(Record::example("a1", "web")).unwrap();
    let refused = state.create(Record::example("a2", "web")).unwrap_err().message;
    assert!(refused.contains("nacelle rm web"), "{refused}");
    first.remove().unwrap();
    state.create(Record::example("a2", "web")).unwrap();
    assert!(state.create(Record::example("a3", "../web")).unwrap_err().message.contains("letters"));
}

#[test]
fn made_up_names_differ() {
    let (_dir, state) = state();
    let first = state.create(Record::example("00aabbccdd", "")).unwrap().record.name;
    let second = state.create(Record::example("00eeff0011", "")).unwrap().record.name;
    assert_ne!(first, second);
}

#[test]
fn a_machine_whose_process_is_gone_is_dead_and_a_reused_number_is_not_taken_for_it() {
    let me = ProcessName::of(std::process::id() as i32).unwrap();
    let mut one = Record::example("a1", "one");
    (one.started, one.monitor, one.keeper) = (Some(1), Some(me), Some(me));
    assert_eq!(one.status(), Status::Running);
    let other = Some(ProcessName { started: me.started + 1, ..me });
    one.monitor = other;
    assert_eq!(one.status(), Status::Running, "its keeper will say how it ended");
    (one.monitor, one.keeper) = (Some(me), other);
    assert_eq!(one.status(), Status::Dead);
    assert!(!one.keeper.unwrap().signal(0));
    one.end = Some(End { exit_code: 0, reason: None, at: 2 });
    assert_eq!(one.status(), Status::Exited);
}

#[test]
fn a_broken_record_is_no_machine_and_hides_no_other() {
    let (_dir, state) = state();
    let broken = state.create(Record::example("a1", "one")).unwrap();
    state.create(Record::example("a2", "two")).unwrap();
    fs::write(broken.file("machine.json"), "{").unwrap();
    let names: Vec<_> = state.machines().unwrap().into_iter().map(|m| m.record.name).collect();
    assert_eq!(names, ["two"]);
}

#[test]
fn sockets_in_a_users_runtime_directory_have_paths_that_fit() {
    let (dir, state) = state();
    let id = fresh_id().unwrap();
    let vsock = state.create(Record::example(&id, "one")).unwrap().vsock();
    let inside = vsock.strip_prefix(dir.path()).unwrap();
    let path = Path::new("/run/user/4294967294/nacelle").join(inside);
    // The agent's port is named behind it.
    assert!(path.as_os_str().len() + "_4294967295".len() <= 107, "{}", path.display());
    assert_eq!(state.find(&id).unwrap().record.id, id);
}

#[test]
fn a_machine_without_processes_is_suspended_while_its_snapshot_is_there() {
    let (_dir, state) = state();
    let mut machine = state.create(Record { started: Some(1), ..Record::example("a1", "one") }).unwrap();
    assert_eq!(machine.status(), Status::Dead);
    fs::create_dir(machine.suspended()).unwrap();
    assert_eq!(machine.status(), Status::Dead, "it is not whole");
    fs::write(machine.suspended().join("manifest.json"), "").unwrap();
    assert_eq!(machine.status(), Status::Suspended);
    assert!(machine.must_run("do x").unwrap_err().message.contains("nacelle resume one' to do x"));
    // Who keeps it says so; then it is about to go on.
    machine.record.keeper = ProcessName::of(std::process::id() as i32);
    machine.save().unwrap();
    assert_eq!(state.find("one").unwrap().record.status(), Status::Running);
}
