//! Regions as the kernel sees them: seals, sizes, huge pages; hostile files; descriptors on their way.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;

use netkernel_abi::{ABI_VERSION, LayoutError, Limits, MAGIC};
use netkernel_shm::fds::{self, MAX_FDS};
use netkernel_shm::{HugePages, Region, RegionError};
use proptest::prelude::*;

const SMALL: Limits = Limits { region_bytes: 16 << 20, sockets: 64, queue_sets: 4 };

fn create(huge: HugePages) -> Result<Region, RegionError> {
    Region::create(SMALL, 5, 50_000, huge)
}

/// A descriptor of the region's own, as a guest gets it.
fn file(region: &Region) -> File {
    // SAFETY: the region lives during this statement.
    let fd = unsafe { BorrowedFd::borrow_raw(region.fd()) };
    fd.try_clone_to_owned().unwrap().into()
}

fn memfd(len: u64) -> File {
    // SAFETY: a valid C string; the result is checked and owned by nobody else.
    let file: File = unsafe {
        let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len).unwrap();
    file
}

#[test]
fn nobody_can_shrink_or_grow_a_region_or_lift_its_seals() {
    let region = create(HugePages::Off).unwrap();
    let file = file(&region);
    for len in [0, 4096, SMALL.region_bytes - 4096, SMALL.region_bytes + 4096, 1 << 40] {
        assert_eq!(file.set_len(len).unwrap_err().kind(), ErrorKind::PermissionDenied, "{len}");
    }
    assert_eq!(file.metadata().unwrap().len(), SMALL.region_bytes);
    // Not by writing behind its end either.
    assert!(file.write_at(b"x", SMALL.region_bytes).is_err());
    // SAFETY: plain system calls on an open descriptor.
    let (seals, more) = unsafe {
        let fd = file.as_raw_fd();
        (libc::fcntl(fd, libc::F_GET_SEALS), libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_WRITE))
    };
    assert_eq!(seals, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL);
    assert_eq!(more, -1, "a guest must not make the region read-only for the engine");
}

#[test]
fn both_sides_see_one_region() {
    let ours = create(HugePages::Off).unwrap();
    let theirs = Region::attach(file(&ours).into()).unwrap();
    assert_eq!(ours.layout(), theirs.layout());
    assert_eq!(theirs.header().guest.load(Relaxed), 5);
    ours.socket(3).unwrap().rx_tail.store(77, Relaxed);
    assert_eq!(theirs.socket(3).unwrap().rx_tail.load(Relaxed), 77);
    let mut tail = 0;
    theirs.job(2).unwrap().push(&mut tail, [1, 2, 3, 4]).unwrap();
    assert_eq!(ours.job(2).unwrap().pop(&mut 0), Ok(Some([1, 2, 3, 4])));
    ours.write_argument(1, b"an argument").unwrap();
    let mut argument = [0; 11];
    theirs.read_argument(1, &mut argument).unwrap();
    assert_eq!(&argument, b"an argument");
    // What does not fit is left out, and the next queue set is not touched.
    ours.write_argument(1, &[0xff; 4000]).unwrap();
    let mut next = [0; 8];
    theirs.read_argument(2, &mut next).unwrap();
    assert_eq!(next, [0; 8]);
}

#[test]
fn what_is_outside_is_not_to_be_had() {
    let region = create(HugePages::Off).unwrap();
    let layout = *region.layout();
    let (start, end) = (layout.payload_offset, layout.payload_offset + layout.payload_bytes);
    assert_eq!(end, SMALL.region_bytes);
    assert!(region.payload(start, end - start).is_some() && region.payload(end - 1, 1).is_some());
    for (offset, len) in [
        (start - 1, 2),
        (0, 1),
        (end, 1),
        (end - 1, 2),
        (start, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
    ] {
        assert!(region.payload(offset, len).is_none(), "{offset} {len}");
    }
    for id in [0, SMALL.sockets, u32::MAX] {
        assert!(region.socket(id).is_none());
    }
    for q in [SMALL.queue_sets, u32::MAX] {
        assert!(region.queue_set(q).is_none() && region.job(q).is_none() && region.receive(q).is_none());
        assert!(region.write_argument(q, b"x").is_none());
    }
}

#[test]
fn discarded_payload_reads_as_zeroes() {
    let region = create(HugePages::Off).unwrap();
    let (file, at) = (file(&region), region.layout().payload_offset);
    let resident = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    let before = resident();
    file.write_all_at(&[9; 64 << 10], at).unwrap();
    assert!(resident() > before);
    region.discard(at, 64 << 10);
    assert_eq!(resident(), before, "the memory is the system's again");
    let mut back = [1; 4096];
    file.read_exact_at(&mut back, at).unwrap();
    assert_eq!(back, [0; 4096]);
    // Outside of the payload it does nothing.
    region.discard(0, 4096);
    assert_eq!(region.header().magic.load(Relaxed), MAGIC);
}

#[test]
fn what_is_no_region_is_refused_with_a_reason() {
    let refused = |fd: OwnedFd| match Region::attach(fd) {
        Ok(_) => panic!("attached"),
        Err(error) => error,
    };
    assert!(matches!(refused(memfd(0).into()), RegionError::Layout(LayoutError::Sizes)));
    assert!(matches!(refused(memfd(4095).into()), RegionError::Layout(LayoutError::Sizes)));
    assert!(matches!(refused(memfd(1 << 20).into()), RegionError::Layout(LayoutError::Magic)));
    let (end, _other) = fds::pair(libc::SOCK_STREAM).unwrap();
    assert!(matches!(refused(end), RegionError::Layout(_) | RegionError::Memory(_)));
    assert!(matches!(refused(fds::eventfd().unwrap()), RegionError::Layout(_) | RegionError::Memory(_)));
    // A file that was cut off behind a good header.
    let region = create(HugePages::Off).unwrap();
    let mut header = [0; 4096];
    file(&region).read_exact_at(&mut header, 0).unwrap();
    let cut = memfd(SMALL.region_bytes - 4096);
    cut.write_all_at(&header, 0).unwrap();
    assert!(matches!(refused(cut.into()), RegionError::Layout(LayoutError::Sizes)));
    // Another release.
    let other = memfd(SMALL.region_bytes);
    header[8..12].copy_from_slice(&(ABI_VERSION + 1).to_le_bytes());
    other.write_all_at(&header, 0).unwrap();
    let error = refused(other.into());
    assert!(matches!(error, RegionError::Layout(LayoutError::Version(v)) if v == ABI_VERSION + 1));
    assert!(error.to_string().contains("restart"), "{error}");
    let wrong = Limits { region_bytes: 1 << 20, ..SMALL };
    assert!(matches!(
        Region::create(wrong, 1, 0, HugePages::Off),
        Err(RegionError::Layout(LayoutError::Sizes))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever the first page says, what can be reached lies in the file.
    #[test]
    fn a_hostile_first_page_reaches_nothing_outside(
        lies in prop::collection::vec((0..20usize, prop_oneof![any::<u32>(), 0..100_000u32, Just(u32::MAX)]), 0..4),
        pages in 1..5000u64,
    ) {
        let region = create(HugePages::Off).unwrap();
        let mut page = [0; 4096];
        file(&region).read_exact_at(&mut page, 0).unwrap();
        for (word, value) in lies {
            page[word * 4..word * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
        let hostile = memfd(pages * 4096);
        hostile.write_all_at(&page, 0).unwrap();
        if let Ok(region) = Region::attach(hostile.into()) {
            let layout = *region.layout();
            prop_assert!(layout.limits.region_bytes <= pages * 4096);
            // The last of each kind can be touched.
            region.socket(layout.limits.sockets - 1).unwrap().state.store(1, Relaxed);
            region.receive(layout.limits.queue_sets - 1).unwrap().push(&mut 0, [1; 4]).unwrap();
            prop_assert!(region.payload(layout.limits.region_bytes - 1, 1).is_some());
            prop_assert!(region.payload(layout.limits.region_bytes, 1).is_none());
        }
    }
}

// ---- huge pages

const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Tests that count free huge pages take turns.
static HUGE: Mutex<()> = Mutex::new(());

/// The host's pool of huge pages, enlarged; as it was before with the end of the value.
struct Pool {
    before: String,
}

impl Pool {
    fn pages() -> u64 {
        std::fs::read_to_string(POOL).unwrap_or_default().trim().parse().unwrap_or(0)
    }

    fn free() -> u64 {
        let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        free.unwrap_or_default().trim().parse().unwrap_or(0)
    }

    /// `None`, with a reason for people, when the host does not allow it.
    fn of(free: u64) -> Option<Pool> {
        let before = std::fs::read_to_string(POOL).ok()?;
        let pool = Pool { before };
        let wanted = Pool::pages() + free.saturating_sub(Pool::free());
        if let Err(error) = std::fs::write(POOL, wanted.to_string()) {
            eprintln!("SKIPPED: {POOL} cannot be set here ({error})");
            return None;
        }
        if Pool::free() < free {
            eprintln!("SKIPPED: this host has no {free} huge pages to spare");
            return None;
        }
        Some(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = std::fs::write(POOL, self.before.trim());
    }
}

#[test]
fn a_region_stands_on_huge_pages_when_the_host_has_them() {
    let _turn = HUGE.lock();
    let needed = SMALL.region_bytes / (2 << 20);
    let before = std::fs::read_to_string(POOL);
    {
        let Some(_pool) = Pool::of(needed) else { return };
        let free = Pool::free();
        for huge in [HugePages::On, HugePages::Auto] {
            let region = create(huge).unwrap();
            let bit = netkernel_abi::feature::HUGE_PAGES;
            assert_ne!(region.header().features.load(Relaxed) & bit, 0, "{huge:?}");
            assert!(Pool::free() < free, "{huge:?}");
            // Reserved as a whole: a touch of any page cannot fail.
            let last = region.payload(SMALL.region_bytes - 8, 8).unwrap();
            // SAFETY: in the payload, aligned, nobody else has it.
            unsafe { last.cast::<u64>().write_volatile(1) };
            let theirs = Region::attach(file(&region).into()).unwrap();
            assert_eq!(theirs.layout(), region.layout());
            let shrunk = file(&region).set_len(0).unwrap_err();
            assert_eq!(shrunk.kind(), ErrorKind::PermissionDenied, "sealed as others");
            drop((region, theirs));
            assert_eq!(Pool::free(), free, "{huge:?}: given back");
        }
        // More than there is: an error that says what to do, or ordinary pages.
        let limits = Limits { region_bytes: (free + 1) * (2 << 20) + SMALL.region_bytes, ..SMALL };
        let Err(error) = Region::create(limits, 1, 0, HugePages::On) else { panic!("made of nothing") };
        assert!(
            matches!(error, RegionError::HugePages(..)) && error.to_string().contains("vm.nr_hugepages"),
            "{error}"
        );
        let region = Region::create(limits, 1, 0, HugePages::Auto).unwrap();
        assert_eq!(region.header().features.load(Relaxed) & netkernel_abi::feature::HUGE_PAGES, 0);
    }
    assert_eq!(std::fs::read_to_string(POOL).ok(), before.ok(), "the host is as it was");
}

// ---- descriptors

#[test]
fn descriptors_arrive_with_their_message() {
    let (a, b) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC).unwrap();
    let files: Vec<File> = (0..MAX_FDS).map(|i| memfd(i as u64 + 1)).collect();
    for count in [0, 1, 3, MAX_FDS] {
        let numbers: Vec<i32> = files[..count].iter().map(|f| f.as_raw_fd()).collect();
        assert_eq!(fds::send(a.as_raw_fd(), b"with", &numbers, 0).unwrap(), 4);
        let mut data = [0; 16];
        let (len, received) = fds::receive(b.as_raw_fd(), &mut data, 0).unwrap();
        assert_eq!((&data[..len], received.len()), (&b"with"[..], count));
        for (i, fd) in received.into_iter().enumerate() {
            // SAFETY: plain system call on an open descriptor.
            let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
            assert_eq!(flags, libc::FD_CLOEXEC);
            assert_eq!(File::from(fd).metadata().unwrap().len(), i as u64 + 1, "in order");
        }
    }
}

#[test]
#[should_panic]
fn more_than_the_limit_is_a_bug_of_ours() {
    let (a, _b) = fds::pair(libc::SOCK_SEQPACKET).unwrap();
    let _ = fds::send(a.as_raw_fd(), b"x", &[a.as_raw_fd(); MAX_FDS + 1], 0);
}

/// A sender of more descriptors than a receiver has room for: nothing is written past the buffer, and what does not fit is
/// not left open.
#[test]
fn too_many_descriptors_of_a_peer_do_no_harm() {
    const COUNT: usize = 60;
    let (a, b) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC).unwrap();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    // By hand, as our own function refuses.
    let mut control = [0u64; 64];
    let byte = b"x";
    let mut iov = libc::iovec { iov_base: byte.as_ptr() as *mut _, iov_len: 1 };
    // SAFETY: the message points to live buffers with their true lengths; the control buffer is aligned and holds COUNT
    // descriptors; an all-zero msghdr is valid.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4 * COUNT as u32) as _;
        assert!(message.msg_controllen as usize <= size_of_val(&control));
        let cmsg = libc::CMSG_FIRSTHDR(&message);
        (*cmsg).cmsg_level = libc::SOL_SOCKET;
        (*cmsg).cmsg_type = libc::SCM_RIGHTS;
        (*cmsg).cmsg_len = libc::CMSG_LEN(4 * COUNT as u32) as _;
        for i in 0..COUNT {
            libc::CMSG_DATA(cmsg).cast::<i32>().add(i).write_unaligned(theirs.as_raw_fd());
        }
        libc::sendmsg(a.as_raw_fd(), &message, 0)
    };
    assert_eq!(sent, 1);
    drop(theirs);
    let mut data = [0; 8];
    let (len, received) = fds::receive(b.as_raw_fd(), &mut data, 0).unwrap();
    assert!(len == 1 && received.len() >= MAX_FDS && received.len() < COUNT, "{}", received.len());
    drop(received);
    // All copies are closed: the other end sees it.
    ours.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    assert_eq!(std::io::Read::read(&mut &ours, &mut data).unwrap(), 0);
}

#[test]
fn an_empty_socket_is_told_apart_from_a_closed_one() {
    let (a, b) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC).unwrap();
    let mut data = [0; 8];
    let error = fds::receive(b.as_raw_fd(), &mut data, libc::MSG_DONTWAIT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    drop(a);
    assert_eq!(fds::receive(b.as_raw_fd(), &mut data, libc::MSG_DONTWAIT).unwrap().0, 0);
    let error = fds::send(b.as_raw_fd(), b"x", &[b.as_fd().as_raw_fd()], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}

/// As many as there are and fit, in order, each with its own descriptors; the end is a message of length 0.
#[test]
fn several_messages_come_at_once() {
    let (a, b) = fds::pair(libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC).unwrap();
    let mut got: Vec<fds::Received<8>> = Vec::new();
    let error = fds::receive_some(b.as_raw_fd(), fds::MANY, &mut got).unwrap_err();
    assert_eq!((error.kind(), got.len()), (ErrorKind::WouldBlock, 0));
    for i in 0..=fds::MANY as u8 {
        let file = memfd(u64::from(i) + 1);
        let carried: &[i32] = if i % 2 == 0 { &[file.as_raw_fd()] } else { &[] };
        fds::send(a.as_raw_fd(), &[i; 4], carried, 0).unwrap();
    }
    fds::send(a.as_raw_fd(), &[9; 20], &[], 0).unwrap();
    drop(a);
    assert_eq!(fds::receive_some(b.as_raw_fd(), 1, &mut got).unwrap(), 1);
    assert_eq!(fds::receive_some(b.as_raw_fd(), usize::MAX, &mut got).unwrap(), fds::MANY);
    assert!(fds::receive_some(b.as_raw_fd(), 2, &mut got).unwrap() == 2, "what was cut, and the end");
    for (i, message) in got.iter().enumerate().take(fds::MANY + 1) {
        assert_eq!((message.len, &message.bytes[..5]), (4, &[i as u8, i as u8, i as u8, i as u8, 0][..]));
        let sizes: Vec<u64> = message
            .descriptors
            .iter()
            .map(|fd| File::from(fd.try_clone().unwrap()).metadata().unwrap().len())
            .collect();
        assert_eq!(sizes, if i % 2 == 0 { vec![i as u64 + 1] } else { vec![] });
    }
    let last: Vec<usize> = got[fds::MANY + 1..].iter().map(|message| message.len).collect();
    assert_eq!(last, [8, 0]);
}
