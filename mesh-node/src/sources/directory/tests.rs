use std::io::Write;

use super::*;
use crate::{
    config::{Configuration, MeshSettings, Publisher},
    id::TrustDomain,
};

fn namespace(name: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: None}}\n")
}

struct Running {
    dir: tempfile::TempDir,
    state: tempfile::TempDir,
    config: Configuration,
}

fn start() -> Running {
    start_in(tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"))
}

/// Starts on a directory as a process that finds it.
fn start_in(dir: tempfile::TempDir, state: tempfile::TempDir) -> Running {
    let mesh = Arc::new(MeshSettings::new("n", TrustDomain::parse("cluster.local").expect("valid")));
    let (sender, receiver) = mpsc::channel(4);
    let (publisher, config) = Publisher::new(mesh, receiver);
    tokio::spawn(publisher.run());
    tokio::spawn(
        Directory::open(dir.path(), LastGood::open(state.path()).expect("state"), "default", "istio-system").expect("open").run(sender),
    );
    Running { dir, state, config }
}

impl Running {
    fn services(&self) -> Vec<String> {
        self.config.load().services().iter().map(|s| s.name.name.to_string()).collect()
    }

    fn errors(&self) -> String {
        self.config.statuses().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    async fn wait_for(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        for _ in 0..500 {
            if condition(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}: {:?} {}", self.services(), self.errors());
    }
}

#[tokio::test]
async fn files_come_change_and_go() {
    let running = start();
    running.wait_for("empty start", |r| r.config.is_ready()).await;
    let file = running.dir.path().join("a.yaml");
    fs::write(&file, namespace("one")).expect("write");
    running.wait_for("created", |r| r.services() == ["one"]).await;
    fs::write(&file, format!("{}---\n{}", namespace("one"), namespace("two"))).expect("write");
    running.wait_for("changed", |r| r.services() == ["one", "two"]).await;
    fs::create_dir(running.dir.path().join("sub")).expect("mkdir");
    fs::write(running.dir.path().join("sub/b.json"), r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"three"}}"#).expect("write");
    running.wait_for("below", |r| r.services() == ["one", "three", "two"]).await;
    fs::remove_file(&file).expect("remove");
    running.wait_for("removed", |r| r.services() == ["three"]).await;
    fs::write(running.dir.path().join(".hidden.yaml"), namespace("no")).expect("write");
    fs::write(running.dir.path().join("notes.txt"), namespace("no")).expect("write");
    fs::write(&file, namespace("four")).expect("write");
    running.wait_for("only manifests", |r| r.services() == ["four", "three"]).await;
}

#[tokio::test]
async fn a_file_being_written_takes_effect_when_it_is_closed() {
    let running = start();
    running.wait_for("empty start", |r| r.config.is_ready()).await;
    let mut file = File::create(running.dir.path().join("a.yaml")).expect("create");
    file.write_all(namespace("half").as_bytes()).expect("write");
    file.sync_all().expect("sync");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(running.services(), Vec::<String>::new());
    file.write_all(format!("---\n{}", namespace("whole")).as_bytes()).expect("write");
    // Who has it open for long is told of.
    tokio::time::sleep(Duration::from_secs(5)).await;
    running.wait_for("said", |r| r.errors().contains("is open for writing")).await;
    assert_eq!(running.services(), Vec::<String>::new());
    drop(file);
    running.wait_for("closed", |r| r.services() == ["half", "whole"] && r.errors().is_empty()).await;
}

#[tokio::test]
async fn a_restart_while_files_are_broken_goes_on_with_what_they_said() {
    let running = start();
    let (broken, half, kept) = (running.dir.path().join("a.yaml"), running.dir.path().join("b.yaml"), running.dir.path().join("c.yaml"));
    fs::write(&broken, namespace("one")).expect("write");
    fs::write(&half, namespace("two")).expect("write");
    fs::write(&kept, namespace("three")).expect("write");
    fs::write(running.dir.path().join("d.yaml"), namespace("four")).expect("write");
    running.wait_for("all good", |r| r.services() == ["four", "one", "three", "two"]).await;
    let Running { dir, state, .. } = running;
    fs::write(&broken, "kind: [").expect("write");
    fs::write(&kept, format!("{}---\napiVersion: v1\nkind: Service\nmetadata: {{name: bad}}\nspec: {{ports: none}}\n", namespace("five")))
        .expect("write");
    fs::remove_file(dir.path().join("d.yaml")).expect("remove");
    let mut writer = File::create(&half).expect("create");
    writer.write_all(b"half").expect("write");
    let again = start_in(dir, state);
    again.wait_for("as before, but for what is gone or new", |r| r.services() == ["five", "one", "two"]).await;
    // What was in force in part is what stays, not what was good before it.
    fs::write(&kept, "kind: {").expect("write");
    again.wait_for("named", |r| r.errors().contains("c.yaml: error: is not YAML")).await;
    let Running { dir, state, .. } = again;
    let again = start_in(dir, state);
    again.wait_for("the last that was in force", |r| r.services() == ["five", "one", "two"]).await;
    fs::write(&kept, format!("{}---\napiVersion: v1\nkind: Service\nmetadata: {{name: bad}}\nspec: {{ports: none}}\n", namespace("five")))
        .expect("write");
    again.wait_for("readable again", |r| r.errors().contains("Service default/bad")).await;
    assert!(again.errors().contains("a.yaml") && again.errors().contains("Service default/bad"), "{}", again.errors());
    writer.set_len(0).expect("truncate");
    fs::write(&half, namespace("six")).expect("write");
    drop(writer);
    again.wait_for("written at last", |r| r.services() == ["five", "one", "six"]).await;
}

/// What was good once, and taken back while something else of its file was refused, does not come again: what stands in for it stays.
#[tokio::test]
async fn what_was_taken_back_stays_so_over_a_restart() {
    let running = start();
    let file = running.dir.path().join("a.yaml");
    let bad = "apiVersion: v1\nkind: Service\nmetadata: {name: one}\nspec: {ports: none}\n---\n";
    let policy = |rules: &str| {
        format!("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p}}\nspec: {{rules: [{rules}]}}\n")
    };
    let rule = |key: &str, value: &str| format!("{{when: [{{key: {key}, values: [{value}]}}]}}");
    let rules = |r: &Running| r.config.load().policies.iter().map(|p| format!("{:?}", p.rules)).collect::<Vec<_>>().concat();
    fs::write(&file, namespace("one") + "---\n" + &policy(&rule("source.namespace", "old"))).expect("write");
    running.wait_for("good", |r| rules(r).contains("old") && r.services() == ["one"]).await;
    fs::write(&file, bad).expect("write");
    running.wait_for("taken back", |r| rules(r).is_empty() && r.services() == ["one"]).await;
    fs::write(&file, bad.to_owned() + &policy(&format!("{}, {}", rule("source.namespace", "new"), rule("nonsense", "x")))).expect("write");
    running.wait_for("in part", |r| rules(r).contains("new") && r.services() == ["one"]).await;
    let Running { dir, state, .. } = running;
    let again = start_in(dir, state);
    again.wait_for("as before", |r| !rules(r).is_empty() && r.services() == ["one"] && r.errors().contains("nonsense")).await;
    assert!(rules(&again).contains("new"), "{}", rules(&again));
}

#[tokio::test]
async fn what_cannot_be_read_stays_and_hides_nothing_else() {
    let running = start();
    let (dir, looped) = (running.dir.path().to_owned(), running.dir.path().join("loop.yaml"));
    fs::create_dir(dir.join("sub")).expect("mkdir");
    fs::write(dir.join("sub/a.yaml"), namespace("one")).expect("write");
    fs::write(&looped, namespace("two")).expect("write");
    running.wait_for("read", |r| r.services() == ["one", "two"]).await;
    // A link to itself: there is something, and nobody can tell what.
    fs::remove_file(&looped).expect("remove");
    std::os::unix::fs::symlink(&looped, &looped).expect("link");
    fs::write(dir.join("b.yaml"), namespace("three")).expect("write");
    running.wait_for("the rest goes on", |r| r.services().contains(&"three".to_owned()) && r.errors().contains("loop.yaml")).await;
    assert_eq!(running.services(), ["one", "three", "two"]);
    let Running { dir, state, .. } = running;
    let again = start_in(dir, state);
    again.wait_for("also over a restart", |r| r.services() == ["one", "three", "two"]).await;
    fs::remove_file(&looped).expect("remove");
    again.wait_for("gone for certain", |r| r.services() == ["one", "three"]).await;
}

#[tokio::test]
async fn garbage_keeps_the_last_good_content_and_says_so() {
    let running = start();
    let file = running.dir.path().join("a.yaml");
    fs::write(&file, namespace("good")).expect("write");
    running.wait_for("good", |r| r.services() == ["good"]).await;
    for garbage in [&b"a: [\nb: }"[..], b"\xff\xfe\x00garbage", b"\x00\x00\x00"] {
        fs::write(&file, garbage).expect("write");
        running.wait_for("garbage named", |r| r.errors().contains("a.yaml: error")).await;
        assert_eq!(running.services(), ["good"]);
        fs::write(&file, namespace("good")).expect("write");
        running.wait_for("good again", |r| r.errors().is_empty()).await;
    }
    let huge = File::create(running.dir.path().join("huge.yaml")).expect("create");
    huge.set_len(MAX_FILE + 1).expect("sparse");
    drop(huge);
    running.wait_for("huge named", |r| r.errors().contains("the limit is")).await;
    assert_eq!(running.services(), ["good"]);
}

/// Where a link leads may be away for a while; who removes the link takes back what it held.
#[tokio::test]
async fn a_link_to_nothing_holds_what_it_held() {
    let elsewhere = tempfile::tempdir().expect("tempdir");
    let (target, below) = (elsewhere.path().join("a.yaml"), elsewhere.path().join("all"));
    fs::write(&target, namespace("one")).expect("write");
    fs::create_dir(&below).expect("made");
    fs::write(below.join("b.yaml"), namespace("two")).expect("write");
    let running = start();
    let (link, all) = (running.dir.path().join("a.yaml"), running.dir.path().join("all"));
    std::os::unix::fs::symlink(&target, &link).expect("linked");
    std::os::unix::fs::symlink(&below, &all).expect("linked");
    std::os::unix::fs::symlink("nowhere", running.dir.path().join("notes.txt")).expect("linked");
    running.wait_for("followed", |r| r.services() == ["one", "two"]).await;
    assert_eq!(running.errors(), "");
    fs::rename(&target, elsewhere.path().join("away")).expect("moved");
    fs::rename(&below, elsewhere.path().join("away.d")).expect("moved");
    running.wait_for("told", |r| r.errors().matches("leads to nothing").count() == 2).await;
    assert_eq!(running.services(), ["one", "two"], "{}", running.errors());
    let told = running.errors();
    assert!(told.contains("what this file held before stays") && told.contains("what was below it before stays"), "{told}");
    fs::rename(elsewhere.path().join("away"), &target).expect("moved");
    fs::remove_file(&all).expect("removed");
    running.wait_for("back, and taken back", |r| r.services() == ["one"] && r.errors().is_empty()).await;
}

/// An edit that makes an object count for nothing where it is takes nothing back, as any other mistake.
#[tokio::test]
async fn what_counts_for_nothing_where_it_is_leaves_what_was_in_force() {
    let running = start();
    running.wait_for("empty start", |r| r.config.is_ready()).await;
    let object = |kind: &str, namespace: &str, spec: &str| {
        format!("apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {spec}\n")
    };
    let elsewhere = "targetRefs: [{kind: GatewayClass, group: gateway.networking.k8s.io, name: istio-waypoint}]";
    let good = [
        object("AuthorizationPolicy", "shop", "{action: DENY, rules: [{}]}"),
        object("PeerAuthentication", "istio-system", "{mtls: {mode: STRICT}}"),
    ];
    let bad = [
        object("AuthorizationPolicy", "shop", &format!("{{{elsewhere}, action: DENY, rules: [{{}}]}}")),
        object("PeerAuthentication", "istio-system", "{selector: {matchLabels: {app: x}}, mtls: {mode: STRICT}}"),
    ];
    let file = running.dir.path().join("p.yaml");
    fs::write(&file, good.join("---\n")).expect("write");
    running.wait_for("in force", |r| r.config.load().policies.len() == 1).await;
    fs::write(&file, bad.join("---\n")).expect("write");
    running.wait_for("told", |r| r.errors().matches("its last good version stays in force").count() == 2).await;
    assert_eq!(running.config.load().policies.len(), 1, "{}", running.errors());
    // Where it counts it is taken.
    let moved = object("AuthorizationPolicy", "istio-system", &format!("{{{elsewhere}, action: DENY, rules: [{{}}]}}"));
    fs::write(&file, moved).expect("write");
    running.wait_for("moved", |r| r.errors().is_empty() && r.config.load().policies.len() == 1).await;
}

fn directory(dir: &tempfile::TempDir, state: &tempfile::TempDir) -> Directory {
    Directory::open(dir.path(), LastGood::open(state.path()).expect("state"), "default", "istio-system").expect("open")
}

fn changed(look: &Look) -> Vec<(bool, String)> {
    let name = |origin: &Origin| origin.to_string().rsplit('/').next().unwrap_or_default().to_owned();
    look.changes.iter().map(|c| (matches!(c.content, Content::Read { .. }), name(&c.origin))).collect()
}

/// That it could not be read says nothing of the next time, when nothing about it has changed.
#[test]
fn what_could_not_be_read_is_read_again() {
    let [dir, state] = [0, 1].map(|_| tempfile::tempdir().expect("tempdir"));
    let mut source = directory(&dir, &state);
    // A file that opens, and cannot be read.
    let path = dir.path().join("a.yaml");
    std::os::unix::fs::symlink("/proc/self/mem", &path).expect("linked");
    assert_eq!(changed(&source.look()), [(false, "a.yaml".to_owned())]);
    assert!(changed(&source.look()).is_empty(), "said once");
    assert!(matches!(source.known.get(&path), Some(Err(problem)) if problem.contains("cannot be read")), "{:?}", source.known);
    fs::remove_file(&path).expect("removed");
    fs::write(&path, namespace("one")).expect("written");
    source.look();
    source.known.insert(path, Err("cannot be read: no more descriptors".to_owned()));
    assert_eq!(changed(&source.look()), [(true, "a.yaml".to_owned())]);
    assert!(changed(&source.look()).is_empty());
}

#[test]
fn that_there_are_too_many_files_is_said_once_and_taken_back() {
    let [dir, state] = [0, 1].map(|_| tempfile::tempdir().expect("tempdir"));
    let mut source = directory(&dir, &state);
    fs::write(dir.path().join("a.yaml"), namespace("one")).expect("written");
    assert_eq!(source.look().changes.len(), 1);
    source.overfull = true;
    let taken_back = source.look().changes;
    assert!(matches!(taken_back.as_slice(), [Change { content: Content::Gone, .. }]), "{taken_back:?}");
    assert!(source.look().changes.is_empty());
}

/// What moves from one file to another is at no time in neither, as when a `ConfigMap` is replaced between two files being looked at.
#[test]
fn an_object_that_moves_between_files_is_never_gone() {
    let [dir, state] = [0, 1].map(|_| tempfile::tempdir().expect("tempdir"));
    let data = |version: &str, file: &str| {
        let data = dir.path().join(version);
        fs::create_dir(&data).expect("made");
        for name in ["a.yaml", "z.yaml"] {
            fs::write(data.join(name), if name == file { namespace("moves") } else { namespace(version.trim_matches('.')) })
                .expect("written");
        }
    };
    let point = |version: &str| {
        std::os::unix::fs::symlink(version, dir.path().join("..new")).expect("linked");
        fs::rename(dir.path().join("..new"), dir.path().join("..data")).expect("renamed");
    };
    data("..1", "z.yaml");
    data("..2", "a.yaml");
    point("..1");
    // Many between the two, so that there is time.
    for i in 0..1000 {
        fs::write(dir.path().join(format!("m{i}.yaml")), "").expect("written");
    }
    ["a.yaml", "z.yaml"].into_iter().for_each(|name| {
        std::os::unix::fs::symlink(format!("..data/{name}"), dir.path().join(name)).expect("linked");
    });
    let mut source = directory(&dir, &state);
    source.look();
    let moved = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for i in 0..12 {
                point(if i % 2 == 0 { "..2" } else { "..1" });
                std::thread::sleep(Duration::from_millis(197));
            }
            moved.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let mut holds = [false, true];
        while !moved.load(std::sync::atomic::Ordering::Relaxed) {
            for change in source.look().changes {
                let Content::Read { objects, .. } = &change.content else { continue };
                let at = usize::from(change.origin.to_string().ends_with("z.yaml"));
                if ["a.yaml", "z.yaml"].iter().any(|name| change.origin.to_string().ends_with(name)) {
                    holds[at] = objects.iter().any(|named| &*named.key.name.name == "moves");
                }
            }
            assert!(holds[0] || holds[1], "it is in neither");
        }
    });
}

#[test]
fn what_changes_while_it_is_read_is_read_again() {
    let settle = |states: &[u32], known: u32| {
        let mut states = states.iter().copied();
        let last = std::cell::Cell::new(0);
        let find = || {
            last.set(states.next().unwrap_or(last.get()));
            last.get()
        };
        until_still(find, |found| format!("of {found}"), |found| *found == known)
    };
    assert_eq!(settle(&[7], 7), (7, "of 7".to_owned(), None), "nothing has changed");
    assert_eq!(settle(&[1], 7), (1, "of 1".to_owned(), None));
    assert_eq!(settle(&[1, 2], 7), (2, "of 2".to_owned(), None));
    assert_eq!(settle(&[1, 2, 3, 4, 5], 7), (4, "of 3".to_owned(), Some(3)), "it never stands still");
}
