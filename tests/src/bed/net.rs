//! Network namespaces of the bed. All addresses live in the bed's own namespaces, so beds do not see each other.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// The namespaces of one bed.
#[derive(Debug)]
pub struct Network {
    id: String,
}

/// Runs `ip` commands inside a namespace, or in the current one.
fn ip(netns: Option<&str>, commands: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    let mut child = command.args(["-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().context("ip (iproute2)")?;
    child.stdin.take().context("stdin")?.write_all(commands.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "ip {netns:?}: {}\n{commands}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn name(id: &str, part: &str) -> String {
    format!("mb{id}-{part}")
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

/// Makes a namespace in which IPv6 addresses are usable at once: nobody else could have them.
fn add(netns: &str) -> Result<()> {
    ip(None, &format!("netns add {netns}\n"))?;
    sysctl(netns, &["net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0"])
}

/// Addresses of a pod.
pub fn pod_addresses(node: usize, host: u16) -> (Ipv4Addr, Ipv6Addr) {
    let (node8, [high, low]) = (u8::try_from(node + 1).unwrap_or(u8::MAX), host.to_be_bytes());
    (Ipv4Addr::new(10, 244, node8 * 16 + high, low), Ipv6Addr::new(0xfd00, 0x244, u16::from(node8), 0, 0, 0, 0, host))
}

impl Network {
    /// The fabric and the nodes.
    pub fn new(id: &str, nodes: usize) -> Result<Self> {
        let fabric = name(id, "fabric");
        add(&fabric)?;
        ip(Some(&fabric), "link set lo up\nlink add br0 type bridge\nlink set br0 up\n")?;
        for node in 0..nodes {
            Self::add_node(id, &fabric, node, nodes)?;
        }
        Ok(Self { id: id.to_owned() })
    }

    fn add_node(id: &str, fabric: &str, node: usize, nodes: usize) -> Result<()> {
        let netns = name(id, &format!("n{node}"));
        add(&netns)?;
        // A bridge without an address of its own takes the lowest of its ports', and pods would send to the old one for a while when
        // another comes.
        ip(
            Some(&netns),
            &format!(
                "link set lo up\nlink add eth0 type veth peer name port{node} netns {fabric}\nlink set eth0 up\n\
                 addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
                 link add cni0 address 0a:58:0a:f4:00:01 type bridge\nlink set cni0 up\naddr add {}/20 dev cni0\naddr add {}/64 dev cni0 nodad\n",
                node_address(node).0,
                node_address(node).1,
                pod_addresses(node, 1).0,
                pod_addresses(node, 1).1
            ),
        )?;
        ip(Some(fabric), &format!("link set port{node} master br0\nlink set port{node} up\n"))?;
        let routes = (0..nodes).filter(|n| *n != node).map(|other| {
            let (pods4, pods6) = pod_addresses(other, 0);
            let (via4, via6) = node_address(other);
            format!("route add {pods4}/20 via {via4}\nroute add {pods6}/64 via {via6}\n")
        });
        ip(Some(&netns), &routes.collect::<String>())?;
        sysctl(&netns, &["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])
    }

    pub fn node(&self, index: usize) -> PathBuf {
        path(&name(&self.id, &format!("n{index}")))
    }

    pub fn fabric(&self) -> PathBuf {
        path(&name(&self.id, "fabric"))
    }

    /// A pod's namespace behind its node's bridge.
    pub fn add_pod(&self, node: usize, host: u16) -> Result<(PathBuf, Vec<IpAddr>)> {
        let (netns, parent) = (name(&self.id, &format!("p{node}-{host}")), name(&self.id, &format!("n{node}")));
        let (v4, v6) = pod_addresses(node, host);
        let (gateway4, gateway6) = pod_addresses(node, 1);
        add(&netns)?;
        ip(Some(&parent), &format!("link add veth{host} type veth peer name eth0 netns {netns}\nlink set veth{host} master cni0 up\n"))?;
        ip(
            Some(&netns),
            &format!(
                "link set lo up\nlink set eth0 up\naddr add {v4}/20 dev eth0\naddr add {v6}/64 dev eth0 nodad\n\
                 route add default via {gateway4}\nroute add default via {gateway6}\n"
            ),
        )?;
        Ok((path(&netns), vec![v4.into(), v6.into()]))
    }

    /// Removes a pod's namespace, with its end of the link as a CNI plugin would.
    pub fn remove_pod(&self, node: usize, host: u16) {
        let (netns, parent) = (name(&self.id, &format!("p{node}-{host}")), name(&self.id, &format!("n{node}")));
        let _ = ip(Some(&parent), &format!("link del veth{host}\n"));
        let _ = ip(None, &format!("netns del {netns}\n"));
    }
}

/// Address of a node towards the others.
pub fn node_address(node: usize) -> (Ipv4Addr, Ipv6Addr) {
    let host = u8::try_from(node + 10).unwrap_or(u8::MAX);
    (Ipv4Addr::new(172, 30, 0, host), Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, u16::from(host)))
}

fn sysctl(netns: &str, settings: &[&str]) -> Result<()> {
    let netns = mesh_node::io::netns::Netns::open(&path(netns))?;
    netns.enter(|| {
        for (key, value) in settings.iter().filter_map(|s| s.split_once('=')) {
            std::fs::write(PathBuf::from("/proc/sys").join(key.replace('.', "/")), value)?;
        }
        Ok(())
    })?
}

/// Removes all namespaces of a bed.
pub fn remove(id: &str) {
    let prefix = format!("mb{id}-");
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten().filter_map(Result::ok);
    let names = entries.filter_map(|e| e.file_name().into_string().ok()).filter(|n| n.starts_with(&prefix));
    let commands = names.map(|n| format!("netns del {n}\n")).collect::<String>();
    if let Err(error) = ip(None, &commands) {
        eprintln!("removing the network of bed {id}: {error:#}");
    }
}
