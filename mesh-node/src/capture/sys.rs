//! The bpf(2) commands on links and pins. They are used directly because links here outlive the process: they are taken
//! over by path and given another program atomically, which the loader library has no call for.

use std::{
    cell::Cell,
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Values of `enum bpf_attach_type`.
pub const CGROUP_SOCK_OPS: u32 = 3;
pub const CGROUP_INET4_CONNECT: u32 = 10;
pub const CGROUP_INET6_CONNECT: u32 = 11;
pub const CGROUP_INET4_GETPEERNAME: u32 = 29;
pub const CGROUP_INET6_GETPEERNAME: u32 = 30;
pub const SK_LOOKUP: u32 = 36;
pub const SK_MSG_VERDICT: u32 = 7;
const TRACE_ITER: u32 = 28;
const TRACE_RAW_TP: u32 = 23;

const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_PROG_QUERY: libc::c_long = 16;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_ITER_CREATE: libc::c_long = 33;
const BPF_LINK_DETACH: libc::c_long = 34;

/// The part of `union bpf_attr` these commands use; the kernel takes shorter ones and zeroes the rest.
#[repr(C)]
#[derive(Default)]
struct PinAttr {
    pathname: u64,
    fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct NextKeyAttr {
    map: u32,
    pad: u32,
    key: u64,
    next_key: u64,
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    /// Room for so many; the kernel writes how many there are.
    count: Cell<u32>,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

/// The beginning of `struct bpf_link_info` of a link on a cgroup.
#[repr(C)]
#[derive(Default)]
struct CgroupLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    cgroup: u64,
    attach_type: u32,
    end: u32,
}

#[repr(C)]
struct AttachAttr {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

/// The kernel writes how many there are into it.
#[repr(C)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    pad: u32,
}

/// The beginning of `struct bpf_prog_test_run_attr`.
#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    program: u32,
    result: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}

/// Makes a map's sockets run a program. Another one it had is replaced, for sockets that come later.
pub fn attach_to_map(map: BorrowedFd<'_>, program: BorrowedFd<'_>, attach_type: u32) -> io::Result<()> {
    bpf(BPF_PROG_ATTACH, &AttachAttr { target: number(map), program: number(program), attach_type, flags: 0 }).map(drop)
}

/// Runs a program once over a packet with a request in it behind an Ethernet header, in the network namespace of this thread;
/// what the packet has in the request's place afterwards.
pub fn test_run<Q: aya::Pod, A: aya::Pod + Default>(program: BorrowedFd<'_>, request: &Q) -> io::Result<A> {
    const HEADER: usize = 14;
    let mut packet = vec![0_u8; HEADER + size_of::<Q>().max(size_of::<A>())];
    // SAFETY: plain data, and a buffer at least as long behind the header.
    unsafe { packet.as_mut_ptr().add(HEADER).cast::<Q>().write_unaligned(*request) };
    let size = u32::try_from(packet.len()).map_err(io::Error::other)?;
    let mut attr = TestRunAttr {
        program: number(program),
        size_in: size,
        size_out: size,
        data_in: packet.as_ptr() as u64,
        data_out: packet.as_mut_ptr() as u64,
        repeat: 1,
        ..TestRunAttr::default()
    };
    // SAFETY: as in `bpf`; the kernel reads the packet before it writes it, both of the size given, and writes the results.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, &raw mut attr, size_of::<TestRunAttr>()) };
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    if attr.result != 0 {
        return Err(io::Error::other("the program could not read its request"));
    }
    // SAFETY: plain data, and a buffer at least as long behind the header.
    Ok(unsafe { packet.as_ptr().add(HEADER).cast::<A>().read_unaligned() })
}

/// A value from the bytes of a ring; none when they are too few.
pub fn plain<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    // SAFETY: plain data, any bytes of which are a value, and as many as it has.
    (bytes.len() >= size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Makes an iterator of a program: each opening of it goes through everything once.
pub fn iterator(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    link_create_at(program, 0, TRACE_ITER)
}

/// Has a program run at its tracepoint for as long as what is returned is open.
pub fn trace(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    link_create_at(program, 0, TRACE_RAW_TP)
}

/// Runs an iterator once, in the network namespace of this thread.
pub fn iterate(link: BorrowedFd<'_>) -> io::Result<()> {
    let iteration = bpf(BPF_ITER_CREATE, &LinkUpdateAttr { link: number(link), ..LinkUpdateAttr::default() }).map(owned)?;
    io::copy(&mut std::fs::File::from(iteration), &mut io::sink()).map(drop)
}

/// Removes an element of a map.
pub fn delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<()> {
    bpf(BPF_MAP_DELETE_ELEM, &NextKeyAttr { map: number(map), pad: 0, key: key.as_ptr() as u64, next_key: 0 }).map(drop)
}

/// The id of the cgroup a link is on; 0 when that is gone.
pub fn link_cgroup(link: BorrowedFd<'_>) -> io::Result<u64> {
    link_info(link).map(|info| info.cgroup)
}

/// The id of the program a link runs.
pub fn link_program(link: BorrowedFd<'_>) -> io::Result<u32> {
    link_info(link).map(|info| info.program)
}

fn link_info(link: BorrowedFd<'_>) -> io::Result<CgroupLinkInfo> {
    let mut info = CgroupLinkInfo::default();
    let length = u32::try_from(size_of::<CgroupLinkInfo>()).map_err(io::Error::other)?;
    bpf(BPF_OBJ_GET_INFO_BY_FD, &InfoAttr { fd: number(link), length, info: (&raw mut info) as u64 })?;
    Ok(info)
}

/// The ids of the programs that are attached to a cgroup itself, whoever did it.
pub fn programs_on(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<Vec<u32>> {
    /// The most the kernel takes on one cgroup (`BPF_CGROUP_MAX_PROGS`).
    const MAX_PROGRAMS: usize = 64;
    let mut ids = [0_u32; MAX_PROGRAMS];
    let count = u32::try_from(MAX_PROGRAMS).map_err(io::Error::other)?;
    let attr = QueryAttr {
        target: number(cgroup),
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        programs: ids.as_mut_ptr() as u64,
        count,
        pad: 0,
    };
    bpf(BPF_PROG_QUERY, &attr)?;
    // Those there are; the rest is as it was.
    Ok(ids.into_iter().take_while(|id| *id != 0).collect())
}

fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<RawFd> {
    // SAFETY: the attribute is a readable, fully initialised prefix of union bpf_attr of the size given; what the kernel writes into it is a cell.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { RawFd::try_from(ret).map_err(io::Error::other) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Attaches a program to a cgroup or network namespace by a link.
pub fn link_create(program: BorrowedFd<'_>, target: BorrowedFd<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    link_create_at(program, number(target), attach_type)
}

fn link_create_at(program: BorrowedFd<'_>, target: u32, attach_type: u32) -> io::Result<OwnedFd> {
    bpf(BPF_LINK_CREATE, &LinkCreateAttr { program: number(program), target, attach_type, flags: 0 }).map(owned)
}

/// Puts another program behind a link, atomically.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_UPDATE, &LinkUpdateAttr { link: number(link), program: number(program), ..LinkUpdateAttr::default() }).map(drop)
}

/// Takes a program off what it is linked to, at once. Letting go of the last reference would do it some time later.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(BPF_LINK_DETACH, &LinkUpdateAttr { link: number(link), ..LinkUpdateAttr::default() }).map(drop)
}

pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(BPF_OBJ_PIN, &PinAttr { pathname: path.as_ptr() as u64, fd: number(fd), file_flags: 0 }).map(drop)
}

/// Opens what is pinned at a path.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(BPF_OBJ_GET, &PinAttr { pathname: path.as_ptr() as u64, ..PinAttr::default() }).map(owned)
}

/// The keys of a map as they are, at most `limit` of them.
pub fn keys(map: BorrowedFd<'_>, key_size: usize, limit: usize) -> io::Result<Vec<Vec<u8>>> {
    let mut found: Vec<Vec<u8>> = Vec::new();
    while found.len() < limit {
        let mut next = vec![0_u8; key_size];
        let from = found.last().map_or(0, |key| key.as_ptr() as u64);
        let attr = NextKeyAttr { map: number(map), pad: 0, key: from, next_key: next.as_mut_ptr() as u64 };
        match bpf(BPF_MAP_GET_NEXT_KEY, &attr) {
            Ok(_) => found.push(next),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The same of a hash table, of keys and values of these sizes, some thousand at once: in few calls, and each key once, whatever comes and goes
/// meanwhile.
pub fn keys_at_once(map: BorrowedFd<'_>, (key, value): (usize, usize), limit: usize) -> io::Result<Vec<Vec<u8>>> {
    const AT_ONCE: u32 = 4096;
    let room = |size: usize| vec![0_u8; size * AT_ONCE as usize];
    let (mut keys, mut values, mut found) = (room(key), room(value), Vec::new());
    let mut from: Option<u32> = None;
    while found.len() < limit {
        let mut next = 0_u32;
        let attr = BatchAttr {
            in_batch: from.as_ref().map_or(0, |from| std::ptr::from_ref(from) as u64),
            out_batch: std::ptr::from_mut(&mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: Cell::new(AT_ONCE),
            map: number(map),
            elem_flags: 0,
            flags: 0,
        };
        let last = match bpf(BPF_MAP_LOOKUP_BATCH, &attr) {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        found.extend(keys.chunks_exact(key).take(attr.count.get() as usize).map(<[u8]>::to_vec));
        if last {
            break;
        }
        from = Some(next);
    }
    Ok(found)
}
