//! The layers of mesh-node: a module imports from its own layer and lower ones, and some crates belong to one module each.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::steps::root;

/// Modules by layer; see ARCHITECTURE.md.
const LAYERS: &[(u8, &[&str])] = &[
    (1, &["id", "io", "problems", "spawn", "telemetry"]),
    (2, &["jwt", "report", "resource", "detect", "policy", "route", "balance"]),
    (3, &["config", "tls", "grpc"]),
    (4, &["identity", "hbone", "capture", "jwks"]),
    (5, &["proxy", "sources"]),
    (6, &["app", "admin", "cli"]),
];

/// Layers whose modules do not import each other.
const SEPARATE: &[u8] = &[4, 5];

/// Crates only these modules use.
const OWNED: &[(&str, &[&str])] = &[
    ("aya", &["capture"]),
    ("h2", &["hbone", "proxy", "grpc"]),
    ("rustls", &["tls", "identity"]),
    ("x509_parser", &["tls", "identity", "jwt"]),
    ("aws_lc_rs", &["tls", "jwt"]),
    ("tokio_rustls", &["tls"]),
    ("rcgen", &["identity"]),
    ("hyper", &["admin", "jwks", "identity"]),
    ("hyper_util", &["admin", "jwks", "identity"]),
    ("netlink_packet_route", &["capture"]),
    ("serde_saphyr", &["sources"]),
];

/// Crates pure decisions never use.
const IMPURE: &[&str] = &["tokio", "hyper", "h2", "aya", "nix", "libc", "socket2", "fastrand"];
/// Ends of paths they never use either, however those are imported.
const IMPURE_PATHS: &[&str] = &["Instant::now", "SystemTime::now", "std::fs", "std::thread", "std::process", "TcpStream::connect"];

/// Fails with every breach.
pub fn run() -> Result<()> {
    let source = root().join("mesh-node/src");
    let mut files = Vec::new();
    find(&source, &mut files)?;
    let mut breaches = Vec::new();
    for file in &files {
        let relative = file.strip_prefix(&source)?;
        let text = fs::read_to_string(file)?;
        check(relative, &text, &mut breaches);
    }
    if breaches.is_empty() {
        println!("layers: {} files keep to them", files.len());
        return Ok(());
    }
    bail!("layers are breached:\n{}", breaches.join("\n"))
}

fn find(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn layer_of(module: &str) -> Option<u8> {
    LAYERS.iter().find(|(_, modules)| modules.contains(&module)).map(|(layer, _)| *layer)
}

fn check(file: &Path, text: &str, breaches: &mut Vec<String>) {
    let first = file.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned()).unwrap_or_default();
    let module = first.trim_end_matches(".rs");
    if ["lib", "bin"].contains(&module) {
        return;
    }
    let Some(layer) = layer_of(module) else {
        breaches.push(format!("{}: module {module} is in no layer; add it to ARCHITECTURE.md and xtask/src/layers.rs", file.display()));
        return;
    };
    for (line, imported) in imports(text) {
        let at = format!("{}:{line}", file.display());
        match layer_of(&imported) {
            Some(other) if other > layer => breaches.push(format!("{at}: {module} (layer {layer}) uses {imported} (layer {other})")),
            Some(other) if other == layer && imported != module && SEPARATE.contains(&layer) => {
                breaches.push(format!("{at}: {module} uses {imported}; modules of layer {layer} do not know each other"));
            }
            _ => {}
        }
    }
    // Tests may use what they like.
    if file.components().any(|c| ["tests.rs", "tests", "testing.rs"].iter().any(|name| c.as_os_str() == *name)) {
        return;
    }
    for (number, line) in without_tests(text) {
        let at = format!("{}:{}", file.display(), number + 1);
        for (name, owners) in OWNED.iter().filter(|(name, owners)| uses(line, name) && !owners.contains(&module)) {
            breaches.push(format!("{at}: {module} uses {name}, which belongs to {}", owners.join(", ")));
        }
        if layer == 2 {
            let crates = IMPURE.iter().filter(|name| uses(line, name));
            let impure = crates.chain(IMPURE_PATHS.iter().filter(|path| line.contains(**path)));
            breaches.extend(impure.map(|name| format!("{at}: {module} is pure and uses {name}")));
        }
    }
}

/// Lines of code with their places from nought, without comments and items that are for tests.
fn without_tests(text: &str) -> Vec<(usize, &str)> {
    let (mut lines, mut skipping, mut depth) = (Vec::new(), false, 0_usize);
    for (number, line) in text.lines().enumerate() {
        let code = line.trim_start();
        if code.starts_with("//") {
            continue;
        }
        if !skipping && code.starts_with("#[cfg(test)]") {
            skipping = true;
            depth = 0;
        }
        if !skipping {
            lines.push((number, line));
            continue;
        }
        // Braces in texts come in pairs, or this would be found out by what follows.
        let opened = line.matches('{').count();
        depth = (depth + opened).saturating_sub(line.matches('}').count());
        let is_attribute = code.starts_with("#[") && code.ends_with(']');
        if depth == 0 && !is_attribute && (opened > 0 || code.ends_with(['}', ';'])) {
            skipping = false;
        }
    }
    lines
}

/// Whether a line names a crate or path as such, not as part of another name.
fn uses(line: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(name).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = &line[at + name.len()..];
        !before.is_some_and(|c| is_word(c) || c == ':' || c == '.') && after.starts_with("::")
    })
}

/// First segments after `crate::`, also within braces, with their lines.
fn imports(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let line = text[..at].lines().count();
        let rest = &text[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => found.extend(top_level(group).into_iter().map(|name| (line, name))),
            None => found.push((line, identifier(rest))),
        }
    }
    found
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The names that begin the parts of a brace group.
fn top_level(group: &str) -> Vec<String> {
    let (mut names, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                names.push(identifier(group[start..at].trim_start()));
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names.retain(|n| !n.is_empty());
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaches(file: &str, text: &str) -> Vec<String> {
        let mut all = Vec::new();
        check(Path::new(file), text, &mut all);
        all
    }

    #[test]
    fn imports_from_a_lower_line_are_breaches() {
        assert!(breaches("policy.rs", "use crate::{id::SpiffeId, resource::{Object, Kind}};").is_empty());
        assert_eq!(breaches("policy.rs", "use crate::{\n    id::SpiffeId,\n    config::Snapshot,\n};").len(), 1);
        assert_eq!(breaches("hbone/pool.rs", "fn f() { crate::capture::x() }").len(), 1);
        assert!(breaches("app/node.rs", "use crate::{admin, cli, proxy::Proxy};").is_empty());
        assert_eq!(breaches("nowhere.rs", "").len(), 1);
    }

    #[test]
    fn owned_crates_and_impurities_are_breaches() {
        assert_eq!(breaches("proxy/x.rs", "use aya::Ebpf;").len(), 1);
        assert!(breaches("capture/x.rs", "use aya::Ebpf;").is_empty());
        assert_eq!(breaches("route.rs", "use tokio::time;").len(), 1);
        assert!(breaches("route.rs", "// tokio::time is not for us\nuse std::time::Instant;").is_empty());
        assert!(breaches("route.rs", "#[cfg(test)]\nmod tests { use tokio::time; }").is_empty());
        assert!(breaches("route.rs", "#[cfg(test)]\nmod tests;\n\n#[cfg(test)]\nuse std::fs;\nfn f() {}").is_empty());
        let behind = "#[cfg(test)]\nthread_local! {\n    static A: u8 = 1;\n}\n\nfn f() { std::time::SystemTime::now(); }";
        assert_eq!(breaches("route.rs", behind).len(), 1);
        assert_eq!(breaches("policy.rs", "let t = Instant::now();").len(), 1);
        assert_eq!(breaches("policy.rs", "let n = fastrand::u8(..);").len(), 1);
    }

    #[test]
    fn architecture_names_every_module() {
        let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
        for (layer, modules) in LAYERS {
            let row = text.lines().find(|l| l.starts_with(&format!("| {layer} "))).unwrap_or_else(|| panic!("no row for layer {layer}"));
            for module in *modules {
                assert!(row.contains(&format!("`{module}`")), "layer {layer} of ARCHITECTURE.md lacks {module}");
            }
        }
    }
}
