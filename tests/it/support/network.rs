//! Machines of a test: namespaces with a name and a network of their own, joined by a switch inside the test's process, which delays
//! packets, loses some, and cuts a machine off. The network of the real machine is not touched, and all of it ends with the test.

#![allow(unsafe_code, reason = "setns, and the request that makes a TUN device")]

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Error, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// What the tests of a module `needs_netns` need, for the message when it is missing.
const NEEDS: &str = "this test needs Linux, root (CAP_SYS_ADMIN and CAP_NET_ADMIN), /dev/net/tun, and the commands unshare and nsenter \
                     (util-linux) and ip (iproute2)";
/// Bytes of the longest packet.
const LONGEST: usize = 9000;
/// What launchers run in place of `ssh`: the name of a file with the machine's process id stands for the machine.
const AGENT: &str = r#"#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
process=$(cat "${0%/*}/$1") || exit 1
shift
exec nsenter --target "$process" --mount --net --uts --pid="/proc/$process/ns/pid_for_children" -- sh -c "$*"
"#;

/// A packet and the time at which it arrives.
type Packet = (Instant, Vec<u8>);

/// Some machines and their switch. Machines are numbered from 0.
pub(crate) struct Network {
    machines: Vec<Machine>,
    line: Arc<Line>,
    folder: TempDir,
}

/// What the switch does to packets.
#[derive(Default)]
struct Line {
    delay_ms: AtomicU64,
    lost_in_thousand: AtomicU32,
    /// Number of the machine that is cut off, counted from 1; 0 for none.
    cut: AtomicUsize,
    /// Bytes that were passed on.
    bytes: AtomicU64,
    /// Packets that were lost.
    lost: AtomicU64,
}

impl Network {
    /// Starts machines of these names.
    pub(crate) fn start(names: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let line = Arc::new(Line::default());
        let agent = folder.path().join("agent");
        fs::write(&agent, AGENT).unwrap();
        fs::set_permissions(&agent, Permissions::from_mode(0o755)).unwrap();
        let (mut machines, mut links) = (Vec::new(), Vec::new());
        for (number, name) in names.iter().enumerate() {
            let machine = Machine::start(name);
            let address = Self::address(number);
            links.push(Arc::new(machine.link(&address)));
            let id = machine.process.id().to_string();
            fs::write(folder.path().join(address), id).unwrap();
            machines.push(machine);
        }
        let (mut senders, mut receivers) = (Vec::new(), Vec::new());
        for _ in &links {
            let (sender, receiver) = channel();
            senders.push(sender);
            receivers.push(receiver);
        }
        for (number, (link, receiver)) in links.iter().zip(receivers).enumerate() {
            let (from, to) = (Arc::clone(link), Arc::clone(link));
            let (line, senders) = (Arc::clone(&line), senders.clone());
            thread::spawn(move || switch(&from, number, &line, &senders));
            thread::spawn(move || deliver(&to, &receiver));
        }
        Self {
            machines,
            line,
            folder,
        }
    }

    /// The address of a machine.
    pub(crate) fn address(machine: usize) -> String {
        format!("10.77.0.{}", machine + 1)
    }

    /// From now on every packet takes this time, and this share of them is lost.
    pub(crate) fn slow(&self, delay: Duration, lost_in_thousand: u32) {
        let delay = u64::try_from(delay.as_millis()).unwrap();
        self.line.delay_ms.store(delay, Ordering::Relaxed);
        self.line
            .lost_in_thousand
            .store(lost_in_thousand, Ordering::Relaxed);
    }

    /// From now on all packets from and to a machine are lost.
    pub(crate) fn cut(&self, machine: usize) {
        self.line.cut.store(machine + 1, Ordering::Relaxed);
    }

    /// From now on a machine gives a TCP connection up when it has sent a packet four times again without an answer: after 6 s, where Linux
    /// takes 15 minutes unless it is told otherwise.
    pub(crate) fn give_up_early(&self) {
        for machine in &self.machines {
            machine.run("echo 4 >/proc/sys/net/ipv4/tcp_retries2");
        }
    }

    /// Bytes that have gone from machine to machine, and packets that were lost.
    pub(crate) fn traffic(&self) -> (u64, u64) {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (load(&self.line.bytes), load(&self.line.lost))
    }

    /// Whether a process of this name runs on a machine.
    pub(crate) fn runs(&self, machine: usize, name: &str) -> bool {
        let network = |process: &Path| fs::read_link(process.join("ns/net")).ok();
        let id = self.machines[machine].process.id();
        let here = network(Path::new(&format!("/proc/{id}")));
        assert!(here.is_some(), "the machine is gone");
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let mut processes = processes.map(|entry| entry.path());
        processes.any(|process| {
            let comm = fs::read_to_string(process.join("comm")).unwrap_or_default();
            comm.trim_end() == name && network(&process) == here
        })
    }

    /// The words before a command that run it on a machine.
    pub(crate) fn on(&self, machine: usize) -> Vec<String> {
        let id = self.machines[machine].process.id().to_string();
        ["nsenter", "--target", id.as_str(), "--net", "--uts"]
            .map(str::to_owned)
            .to_vec()
    }

    /// The program that launchers run in place of `ssh`; it knows the machines by their addresses.
    pub(crate) fn agent(&self) -> PathBuf {
        self.folder.path().join("agent")
    }

    /// A folder for the files of launchers; it is removed with the network.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// A machine: a process of `unshare` in namespaces of its own, with which all other processes of the machine end. It ends by itself when
/// the test does, however that ends, because its standard input does.
struct Machine {
    process: Child,
}

impl Machine {
    fn start(name: &str) -> Self {
        let script = format!(
            "echo {name} >/proc/sys/kernel/hostname && mount -t sysfs sysfs /sys && ip link set lo up && echo ready && exec cat"
        );
        let namespaces = [
            "--net",
            "--uts",
            "--pid",
            "--mount-proc",
            "--fork",
            "--kill-child",
        ];
        let process = Command::new("unshare")
            .args(namespaces)
            .args(["sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect(NEEDS);
        let mut machine = Self { process };
        let mut said = String::new();
        let output = machine.process.stdout.take().unwrap();
        BufReader::new(output).read_line(&mut said).unwrap();
        assert_eq!(said, "ready\n", "no machine can be made: {NEEDS}");
        machine
    }

    /// Gives the machine its network device, and returns the other end of it.
    fn link(&self, address: &str) -> File {
        let id = self.process.id();
        let network = File::open(format!("/proc/{id}/ns/net")).unwrap();
        // The thread ends inside the machine's network, and the device stays.
        let link = thread::spawn(move || open_link(&network)).join().unwrap();
        self.run(&format!(
            "ip address add {address}/24 dev link0 && ip link set link0 mtu {LONGEST} up"
        ));
        link
    }

    /// Runs a shell's command in the machine's network.
    fn run(&self, script: &str) {
        let id = self.process.id().to_string();
        let status = Command::new("nsenter")
            .args(["--target", &id, "--net", "sh", "-c", script])
            .status();
        assert!(status.expect(NEEDS).success(), "{script}: {NEEDS}");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already.
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Enters a network with this thread and makes the device `link0` there: what is read are the packets that the machine sends.
fn open_link(network: &File) -> File {
    // SAFETY: the descriptor is open; the call changes this thread's network and nothing else.
    let entered = unsafe { libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(entered, 0, "setns: {}; {NEEDS}", Error::last_os_error());
    let device = File::options().read(true).write(true).open("/dev/net/tun");
    let device = device.expect(NEEDS);
    // SAFETY: a request of zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"link0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open, and the request is alive and of the type that this call reads and writes.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(made, 0, "TUNSETIFF: {}; {NEEDS}", Error::last_os_error());
    device
}

/// Takes the packets of a machine until it ends, and sends them on.
fn switch(mut link: &File, machine: usize, line: &Line, machines: &[Sender<Packet>]) {
    let mut random = fastrand::Rng::with_seed(machine as u64);
    let mut buffer = vec![0; LONGEST];
    while let Ok(length) = link.read(&mut buffer) {
        let packet = &buffer[..length];
        // IPv4 only; the last number of the address that it goes to is the machine's, counted from 1.
        let (Some(&(0x40..=0x4f)), Some(&last)) = (packet.first(), packet.get(19)) else {
            continue;
        };
        let last = usize::from(last);
        let Some(to) = last.checked_sub(1).and_then(|to| machines.get(to)) else {
            continue;
        };
        let cut = line.cut.load(Ordering::Relaxed);
        let unlucky = random.u32(..1000) < line.lost_in_thousand.load(Ordering::Relaxed);
        if unlucky || cut == last || cut == machine + 1 {
            line.lost.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        line.bytes.fetch_add(length as u64, Ordering::Relaxed);
        let delay = Duration::from_millis(line.delay_ms.load(Ordering::Relaxed));
        if to.send((Instant::now() + delay, packet.to_vec())).is_err() {
            return;
        }
    }
}

/// Gives a machine its packets, each at its time.
fn deliver(mut link: &File, packets: &Receiver<Packet>) {
    for (time, packet) in packets {
        thread::sleep(time.saturating_duration_since(Instant::now()));
        // A machine that has ended takes none.
        link.write_all(&packet).ok();
    }
}
