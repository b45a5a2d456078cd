//! The bed as kubelet and API server: pods from specs and Deployments, Services with addresses, `EndpointSlices`.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use mesh_node::io::netns::Netns;
use serde_json::{Value, json};

use super::{Bed, Process, cgroup, process, program, wait_for, write_atomically};

/// What a pod is made from.
#[derive(Debug, Clone, Default)]
pub struct PodSpec {
    pub name: String,
    pub namespace: String,
    pub node: usize,
    pub labels: BTreeMap<String, String>,
    pub service_account: String,
    /// Program and arguments; empty for a pod that only sleeps.
    pub command: Vec<String>,
    pub environment: BTreeMap<String, String>,
    /// The pod is ready when something listens here.
    pub port: Option<u16>,
    /// Takes this place on the node's network; of a pod that is gone, for instance.
    pub address: Option<u16>,
    /// Directory of its quality of service below `kubepods`; none for a guaranteed pod.
    pub quality: String,
}

impl PodSpec {
    /// A pod that only sleeps.
    pub fn new(name: &str, node: usize) -> Self {
        Self {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            node,
            labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
            service_account: name.to_owned(),
            quality: "burstable".to_owned(),
            ..Self::default()
        }
    }

    /// A pod that runs the probe server on port 8080 (and a server that speaks first on 8081).
    pub fn server(name: &str, node: usize) -> Self {
        let command = [program("probe").display().to_string(), "serve".to_owned(), "8080".to_owned()];
        Self { command: command.into(), port: Some(8080), ..Self::new(name, node) }
    }

    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    pub fn in_namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    pub fn account(mut self, account: &str) -> Self {
        account.clone_into(&mut self.service_account);
        self
    }

    pub fn quality(mut self, class: &str) -> Self {
        class.clone_into(&mut self.quality);
        self
    }

    pub fn at(mut self, address: u16) -> Self {
        self.address = Some(address);
        self
    }
}

/// A pod that runs.
#[derive(Debug)]
pub struct Pod {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub node: usize,
    pub netns: PathBuf,
    pub cgroup: PathBuf,
    pub addresses: Vec<IpAddr>,
    /// Its place on the node's network.
    pub host: u16,
    labels: BTreeMap<String, String>,
    ready: bool,
    processes: Vec<Process>,
}

impl Clone for Pod {
    /// A description of the same pod; its processes end when the bed lets go of it.
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            uid: self.uid.clone(),
            netns: self.netns.clone(),
            cgroup: self.cgroup.clone(),
            addresses: self.addresses.clone(),
            labels: self.labels.clone(),
            processes: Vec::new(),
            ..*self
        }
    }
}

impl Pod {
    pub fn v4(&self) -> IpAddr {
        self.addresses[0]
    }

    pub fn v6(&self) -> IpAddr {
        self.addresses[1]
    }

    pub fn address(&self, port: u16) -> String {
        SocketAddr::new(self.v4(), port).to_string()
    }

    pub fn address6(&self, port: u16) -> String {
        SocketAddr::new(self.v6(), port).to_string()
    }
}

/// Services and the addresses given to them.
#[derive(Debug, Default)]
pub(super) struct Services {
    by_name: BTreeMap<(String, String), Service>,
}

#[derive(Debug, Clone)]
struct Service {
    document: Value,
    selector: BTreeMap<String, String>,
    number: u16,
}

impl Bed {
    /// Starts a pod and waits until it is ready.
    pub fn pod(&mut self, spec: &PodSpec) -> Result<Pod> {
        let host = spec.address.unwrap_or(self.next_address);
        if spec.address.is_none() {
            self.next_address += 1;
        }
        let (netns, addresses) = self.network.add_pod(spec.node, host)?;
        let uid = new_uid(&self.id, self.pods.len(), host);
        let cgroup = self.nodes[spec.node].cgroup.join("kubepods").join(&spec.quality).join(format!("pod{uid}/c0"));
        fs::create_dir_all(&cgroup)?;
        let mut pod = Pod {
            name: spec.name.clone(),
            namespace: spec.namespace.clone(),
            uid,
            node: spec.node,
            netns,
            cgroup,
            addresses,
            host,
            labels: spec.labels.clone(),
            ready: spec.port.is_none(),
            processes: Vec::new(),
        };
        if !self.hosts(&spec.namespace).exists() {
            self.namespace(&spec.namespace, &[])?;
        }
        pod.processes.push(self.start_container(&pod, spec)?);
        self.write_pod(&pod, &spec.service_account, spec.port)?;
        if let Some(port) = spec.port {
            let netns = Netns::open(&pod.netns)?;
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            wait_for(&format!("pod {} listens", pod.name), Duration::from_secs(10), || {
                Ok(netns.enter(|| std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200)))?.is_ok())
            })?;
            pod.ready = true;
        }
        let description = pod.clone();
        self.pods.insert(format!("{}/{}", pod.namespace, pod.name), pod);
        self.write_slices()?;
        Ok(description)
    }

    fn start_container(&self, pod: &Pod, spec: &PodSpec) -> Result<Process> {
        let mut command = if let Some((program, arguments)) = spec.command.split_first() {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        } else {
            let mut command = Command::new("sleep");
            command.arg("100000");
            command
        };
        let log = fs::File::create(self.directory.join(format!("logs/pod-{}-{}.log", pod.namespace, pod.name)))?;
        command.envs(&spec.environment).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        process::place(&mut command, Some(pod.netns.clone()), Some(pod.cgroup.clone()), Some(self.hosts(&pod.namespace)));
        Process::start(command)
    }

    fn write_pod(&self, pod: &Pod, service_account: &str, port: Option<u16>) -> Result<()> {
        let ips: Vec<_> = pod.addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let probe = port.map(|p| json!({"tcpSocket": {"port": p}}));
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": pod.name, "namespace": pod.namespace, "uid": pod.uid, "labels": pod.labels},
            "spec": {"nodeName": self.nodes[pod.node].name, "serviceAccountName": service_account,
                "containers": [{"name": "c0", "readinessProbe": probe}]},
            "status": {"phase": "Running", "podIP": pod.v4(), "podIPs": ips},
        });
        write_atomically(&self.config().join(format!("pods/{}-{}.json", pod.namespace, pod.name)), &object.to_string())
    }

    /// Changes a running pod's labels.
    pub fn relabel(&mut self, pod: &Pod, key: &str, value: Option<&str>) -> Result<()> {
        let path = self.config().join(format!("pods/{}-{}.json", pod.namespace, pod.name));
        let mut object: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        match value {
            Some(value) => object["metadata"]["labels"][key] = json!(value),
            None => drop(object["metadata"]["labels"].as_object_mut().and_then(|l| l.remove(key))),
        }
        write_atomically(&path, &object.to_string())
    }

    /// Changes the addresses the API says a running pod has.
    pub fn set_addresses(&mut self, pod: &Pod, addresses: &[IpAddr]) -> Result<()> {
        let path = self.config().join(format!("pods/{}-{}.json", pod.namespace, pod.name));
        let mut object: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        object["status"]["podIP"] = json!(addresses.first());
        object["status"]["podIPs"] = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        write_atomically(&path, &object.to_string())
    }

    /// Ends a pod: processes, cgroup, network and objects.
    pub fn delete(&mut self, pod: &Pod) -> Result<()> {
        drop(self.pods.remove(&format!("{}/{}", pod.namespace, pod.name)));
        if let Some(directory) = pod.cgroup.parent() {
            cgroup::remove(directory);
        }
        self.network.remove_pod(pod.node, pod.host);
        fs::remove_file(self.config().join(format!("pods/{}-{}.json", pod.namespace, pod.name)))?;
        self.write_slices()
    }

    /// Says whether a pod is ready, as a failing or passing readiness probe would.
    pub fn set_ready(&mut self, pod: &Pod, ready: bool) -> Result<()> {
        let entry = self.pods.get_mut(&format!("{}/{}", pod.namespace, pod.name)).context("a pod of this bed")?;
        entry.ready = ready;
        self.write_slices()
    }

    /// A `ClusterIP` service of both families for the pods with a label `app` of its name; returns its addresses.
    pub fn service(&mut self, namespace: &str, name: &str, port: u16, target: u16) -> Result<(IpAddr, IpAddr)> {
        let document = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {"ports": [{"port": port, "targetPort": target, "name": "tcp"}], "selector": {"app": name}},
        });
        self.add_service(document, namespace)
    }

    fn add_service(&mut self, mut document: Value, namespace: &str) -> Result<(IpAddr, IpAddr)> {
        let name = document["metadata"]["name"].as_str().context("a service's name")?.to_owned();
        // One that is applied again keeps its addresses.
        let known = self.services.by_name.get(&(namespace.to_owned(), name.clone())).map(|service| service.number);
        let number = known.map_or_else(|| u16::try_from(self.services.by_name.len() + 1), Ok)?;
        let [high, low] = number.to_be_bytes();
        let v4 = IpAddr::from(Ipv4Addr::new(10, 96, high, low));
        let v6 = IpAddr::from(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number));
        document["metadata"]["namespace"] = json!(namespace);
        if document["spec"]["clusterIP"] != "None" {
            document["spec"]["clusterIP"] = json!(v4);
            document["spec"]["clusterIPs"] = json!([v4, v6]);
            let files = if known.is_some() { Vec::new() } else { self.host_names(namespace, &name)? };
            for (file, names) in files {
                let mut text = fs::read_to_string(&file)?;
                text += &format!("{v4} {names}\n{v6} {names}\n");
                // In place: the file is mounted into pods that run.
                fs::write(&file, text)?;
            }
        }
        write_atomically(&self.config().join(format!("services/{namespace}-{name}.json")), &document.to_string())?;
        let selector = serde_json::from_value(document["spec"]["selector"].clone()).unwrap_or_default();
        self.services.by_name.insert((namespace.to_owned(), name), Service { document, selector, number });
        self.write_slices()?;
        Ok((v4, v6))
    }

    /// The hosts files of all namespaces with the names a service has there.
    fn host_names(&self, namespace: &str, name: &str) -> Result<Vec<(PathBuf, String)>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(self.directory.join("hosts"))? {
            let entry = entry?;
            let full = format!("{name}.{namespace} {name}.{namespace}.svc {name}.{namespace}.svc.cluster.local");
            let names = if entry.file_name() == namespace { format!("{name} {full}") } else { full };
            all.push((entry.path(), names));
        }
        Ok(all)
    }

    /// Applies YAML as `kubectl apply` would: Services and Deployments come to life, everything else goes to the nodes as
    /// it is. Pods of Deployments are spread over the nodes.
    pub fn kubectl_apply(&mut self, name: &str, yaml: &str) -> Result<Vec<Pod>> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).with_context(|| name.to_owned())?;
        let mut pods = Vec::new();
        for (index, document) in documents.into_iter().filter(|d| !d.is_null()).enumerate() {
            let namespace = document["metadata"]["namespace"].as_str().unwrap_or("default").to_owned();
            match document["kind"].as_str() {
                Some("Service") => drop(self.add_service(document, &namespace)?),
                Some("Deployment") => pods.extend(self.deploy(&document, &namespace)?),
                Some(_) => self.apply(&format!("{name}-{index}"), &document.to_string())?,
                None => bail!("{name}: a document without kind"),
            }
        }
        Ok(pods)
    }

    fn deploy(&mut self, document: &Value, namespace: &str) -> Result<Vec<Pod>> {
        let name = document["metadata"]["name"].as_str().context("a Deployment's name")?;
        let template = &document["spec"]["template"];
        let container = &template["spec"]["containers"][0];
        let image = container["image"].as_str().context("an image")?;
        let replicas = document["spec"]["replicas"].as_u64().unwrap_or(1);
        let mut pods = Vec::new();
        for replica in 0..replicas {
            let node = (self.pods.len()) % self.nodes.len();
            let spec = PodSpec {
                name: format!("{name}-{replica}"),
                namespace: namespace.to_owned(),
                node,
                labels: serde_json::from_value(template["metadata"]["labels"].clone())?,
                service_account: template["spec"]["serviceAccountName"].as_str().unwrap_or("default").to_owned(),
                command: command_of(image)?,
                environment: BTreeMap::new(),
                port: container["ports"][0]["containerPort"].as_u64().and_then(|p| u16::try_from(p).ok()),
                address: None,
                quality: "besteffort".to_owned(),
            };
            pods.push(self.pod(&spec)?);
        }
        Ok(pods)
    }

    /// Writes the `EndpointSlices` of all services.
    fn write_slices(&self) -> Result<()> {
        let items: Vec<Value> = self.services.by_name.iter().flat_map(|((ns, name), s)| self.slices(ns, name, s)).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        write_atomically(&self.config().join("services/slices.json"), &list.to_string())
    }

    fn slices(&self, namespace: &str, name: &str, service: &Service) -> Vec<Value> {
        let selected = |p: &&Pod| {
            p.namespace == namespace && !service.selector.is_empty() && service.selector.iter().all(|(k, v)| p.labels.get(k) == Some(v))
        };
        let pods = self.pods.values().filter(selected).collect::<Vec<_>>();
        let ports = service.document["spec"]["ports"].as_array().cloned().unwrap_or_default();
        let ports: Vec<Value> = ports
            .iter()
            .map(|p| json!({"name": p["name"].as_str().unwrap_or(""), "port": p["targetPort"].as_u64().or(p["port"].as_u64()), "protocol": "TCP"}))
            .collect();
        [("IPv4", 0), ("IPv6", 1)]
            .map(|(family, index)| {
                let endpoints = pods.iter().map(|p| {
                    json!({"addresses": [p.addresses[index]], "conditions": {"ready": p.ready}, "nodeName": self.nodes[p.node].name,
                        "targetRef": {"kind": "Pod", "name": p.name, "namespace": p.namespace, "uid": p.uid}})
                });
                json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                    "metadata": {"name": format!("{name}-{family}").to_lowercase(), "namespace": namespace,
                        "labels": {"kubernetes.io/service-name": name}},
                    "endpoints": endpoints.collect::<Vec<_>>(), "ports": ports})
            })
            .into()
    }
}

/// The program that stands for an image.
fn command_of(image: &str) -> Result<Vec<String>> {
    let name = image.rsplit('/').next().unwrap_or(image);
    let name = name.split(':').next().unwrap_or(name);
    let Some(rest) = name.strip_prefix("examples-bookinfo-") else { bail!("no program stands for image {image}") };
    let (service, version) = rest.rsplit_once('-').context("an image of the form examples-bookinfo-SERVICE-VERSION")?;
    Ok(vec![program("bookinfo").display().to_string(), service.to_owned(), version.to_owned()])
}

/// A UID of the form Kubernetes gives, unique on this machine.
fn new_uid(bed: &str, count: usize, host: u16) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (bed, count, host, std::time::Instant::now()).hash(&mut hasher);
    let h = hasher.finish();
    format!("{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}", h >> 32, (h >> 16) & 0xffff, h & 0xfff, count & 0xfff, h & 0xffff_ffff_ffff)
}
