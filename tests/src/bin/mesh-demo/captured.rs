//! Packets between the nodes, captured, and what can be read of them.

use std::{
    collections::BTreeMap,
    io::Read,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Bed,
    bed::{Process, wait_for},
};
use nix::sys::signal::Signal;

/// A packet capture where node 1 is joined to the bridge between the nodes.
pub struct Capture {
    process: Process,
    file: PathBuf,
}

/// What a capture shows.
pub struct Summary {
    pub packets: usize,
    bytes: usize,
    pub flows: usize,
    /// Segments with data on HBONE connections that begin a record which is not TLS.
    pub not_tls: usize,
    /// TCP packets on other ports.
    pub others: BTreeMap<String, usize>,
    pub plaintext_found: bool,
}

impl Capture {
    pub fn start(bed: &Bed) -> Result<Self> {
        let file = bed.directory.join("between-nodes.pcap");
        let mut command = Command::new("ip");
        let netns = bed.fabric_netns();
        let name = netns.file_name().and_then(|n| n.to_str()).context("a name")?;
        command.args(["netns", "exec", name, "tcpdump", "-i", "port0", "-s", "0", "-U", "-w"]).arg(&file).arg("tcp");
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let process = Process::start(command)?;
        wait_for("the packet capture", Duration::from_secs(5), || Ok(file.exists()))?;
        std::thread::sleep(Duration::from_millis(200));
        Ok(Self { process, file })
    }

    pub fn finish(mut self) -> Result<Summary> {
        std::thread::sleep(Duration::from_millis(300));
        self.process.signal(Signal::SIGTERM);
        self.process.wait(Duration::from_secs(5));
        let mut bytes = Vec::new();
        std::fs::File::open(&self.file)?.read_to_end(&mut bytes)?;
        Summary::read(&bytes)
    }
}

impl Summary {
    /// Reads the classic pcap format of tcpdump on an Ethernet bridge.
    fn read(pcap: &[u8]) -> Result<Self> {
        ensure!(pcap.get(..4) == Some(&[0xd4, 0xc3, 0xb2, 0xa1]), "not a pcap file of this machine's byte order");
        let mut summary = Self { packets: 0, bytes: 0, flows: 0, not_tls: 0, others: BTreeMap::new(), plaintext_found: false };
        let mut streams: BTreeMap<(Vec<u8>, Vec<u8>), Stream> = BTreeMap::new();
        let mut at = 24;
        while let Some(header) = pcap.get(at..at + 16) {
            let length = u32::from_le_bytes(header[8..12].try_into()?) as usize;
            let Some(frame) = pcap.get(at + 16..at + 16 + length) else { break };
            at += 16 + length;
            if let Some(segment) = Segment::parse(frame) {
                summary.packets += 1;
                summary.bytes += segment.data.len();
                if segment.ports.0 == 15008 || segment.ports.1 == 15008 {
                    streams.entry(segment.key()).or_default().take(&segment);
                } else {
                    *summary.others.entry(format!("TCP {} to {}", segment.ports.0, segment.ports.1)).or_default() += 1;
                }
                let text = String::from_utf8_lossy(segment.data);
                summary.plaintext_found |= ["HTTP/1.1", "GET /", "reviewer"].iter().any(|w| text.contains(w));
            }
        }
        summary.flows = streams.len() / 2;
        summary.not_tls = streams.values().filter(|s| !s.is_tls()).count();
        Ok(summary)
    }

    pub fn print(&self) {
        println!("   {} TCP packets with {} bytes of data, {} connections, all on port 15008", self.packets, self.bytes, self.flows);
        println!(
            "   both directions of every connection are an unbroken sequence of TLS records: {}",
            if self.not_tls == 0 { "yes" } else { "NO" }
        );
        println!("   HTTP or anything of Bookinfo readable in any packet: {}", if self.plaintext_found { "YES" } else { "no" });
        for (what, n) in &self.others {
            println!("   NOT HBONE: {what}: {n} packets");
        }
    }
}

/// A TCP segment.
struct Segment<'a> {
    addresses: (&'a [u8], &'a [u8]),
    ports: (u16, u16),
    sequence: u32,
    data: &'a [u8],
}

impl<'a> Segment<'a> {
    fn parse(frame: &'a [u8]) -> Option<Self> {
        let (addresses, tcp) = match frame.get(12..14)? {
            [0x08, 0x00] => {
                let ip = frame.get(14..)?;
                let header = usize::from(ip.first()? & 0xf) * 4;
                let total = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
                ((ip.get(12..16)?, ip.get(16..20)?), ip.get(header..total)?)
            }
            [0x86, 0xdd] => {
                let ip = frame.get(14..)?;
                let length = usize::from(u16::from_be_bytes([*ip.get(4)?, *ip.get(5)?]));
                ((ip.get(8..24)?, ip.get(24..40)?), ip.get(40..40 + length)?)
            }
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
        let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
        let data = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?;
        Some(Self { addresses, ports: (port(0)?, port(2)?), sequence, data })
    }

    fn key(&self) -> (Vec<u8>, Vec<u8>) {
        let end = |address: &[u8], port: u16| [address, &port.to_be_bytes()].concat();
        (end(self.addresses.0, self.ports.0), end(self.addresses.1, self.ports.1))
    }
}

/// One direction of a connection, put together again.
#[derive(Default)]
struct Stream {
    pieces: BTreeMap<u32, Vec<u8>>,
}

impl Stream {
    fn take(&mut self, segment: &Segment<'_>) {
        if !segment.data.is_empty() {
            self.pieces.entry(segment.sequence).or_insert_with(|| segment.data.to_vec());
        }
    }

    /// Whether the bytes are TLS records one after the other. A connection older than the capture is not.
    fn is_tls(&self) -> bool {
        let mut bytes = Vec::new();
        let mut next = None;
        for (sequence, data) in &self.pieces {
            let overlap = next.map_or(0, |n: u32| n.wrapping_sub(*sequence) as usize);
            if overlap > data.len() {
                continue;
            }
            bytes.extend_from_slice(&data[overlap..]);
            next = Some(sequence.wrapping_add(u32::try_from(data.len()).unwrap_or(0)));
        }
        let mut at = 0;
        while let Some(header) = bytes.get(at..at + 5) {
            let known = (20..=23).contains(&header[0]) && header[1] == 3;
            if !known {
                return false;
            }
            at += 5 + usize::from(u16::from_be_bytes([header[3], header[4]]));
        }
        true
    }
}
