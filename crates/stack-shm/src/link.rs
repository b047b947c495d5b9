//! A connection in memory: two streams, with the states that TCP would be in.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use netkernel_service::{Close, Errno, Paired, Readiness, Received, Segments, Shutdown};

use crate::inbox::{Inbox, lock};
use crate::left::{LeftEnd, LeftLink, from_text, to_text};
use crate::pairs::Slot;

/// Pieces up to this size are queued while the queue has room; larger ones wait in the sender's ring for the receiver.
const SMALL: usize = 4096;
/// Bytes of one direction's queue.
const QUEUE: usize = 16384;
/// A queue that is empty again keeps no more memory than this.
const KEEP: usize = 4096;

/// Which end of a link: the one that connected, or the one that accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

impl Side {
    pub fn number(self) -> usize {
        self as usize
    }

    pub fn other(self) -> Side {
        match self {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }
}

pub(crate) struct Link {
    state: Mutex<State>,
    /// Where the two guests move the payload themselves; no queue, no offer and no urgent byte is here then.
    pair: Option<Slot>,
}

struct State {
    /// Not established: the listener's backlog is full.
    established: bool,
    client: End,
    server: End,
}

/// One end, and what travels to it.
#[derive(Default)]
struct End {
    /// Who is told, with the socket's key. `None`: nobody (not accepted yet, or closed).
    inbox: Option<(Arc<Inbox>, u64)>,
    queue: VecDeque<u8>,
    /// Behind the queue: bytes that still stand in the peer's send ring.
    offer: Option<Offer>,
    /// Bytes of this end's own offer that the peer took, and that this end was not told of.
    taken: usize,
    /// Bytes received so far, and the position of the urgent one.
    received: u64,
    urgent: Option<Urgent>,
    inline: bool,
    /// FIN of the peer, behind all bytes.
    fin: bool,
    /// This end sent FIN.
    shut: bool,
    shut_read: bool,
    /// RST: nothing goes any more; told once by `error`.
    over: bool,
    error: Option<Errno>,
    closed: bool,
    /// Nothing was there to receive, or no room to send; a report is due when that changes.
    wants_read: bool,
    wants_write: bool,
}

struct Urgent {
    at: u64,
    byte: Option<u8>,
    /// The receiver asked for the byte. It is not passed before: what is ready may be told of piece by piece.
    told: bool,
}

/// A sender's bytes where they are.
struct Offer(Segments);

// SAFETY: the runs stay mapped until the sender's next `send`, `disconnect` or `close` (contract of `Stack::send`), and these take
// the offer back under the link's lock, which every access holds.
unsafe impl Send for Offer {}

impl Link {
    /// `inbox`, `key`: of the client. Reports begin with what follows.
    pub fn new(inbox: Arc<Inbox>, key: u64, inline: bool, pair: Option<Slot>) -> Link {
        let client = End { inbox: Some((inbox, key)), wants_read: true, inline, ..End::default() };
        Link { state: Mutex::new(State { established: false, client, server: End::default() }), pair }
    }

    /// As it is; nobody may change it any more.
    pub fn written(self: &Arc<Link>) -> LeftLink {
        let state = lock(&self.state);
        LeftLink {
            id: Arc::as_ptr(self) as u64,
            established: state.established,
            ends: [state.client.written(), state.server.written()],
            pair: self.pair.as_ref().map(|pair| (pair.memory(), pair.index())),
        }
    }

    /// As another program left it. Its ends are attached by those whose they are.
    pub fn remake(left: &LeftLink, pair: Option<Slot>) -> Link {
        let [client, server] = left.ends.each_ref().map(End::of);
        Link { state: Mutex::new(State { established: left.established, client, server }), pair }
    }

    /// Somebody has this end, and looks at everything.
    pub fn attach(&self, side: Side, inbox: Arc<Inbox>, key: u64) {
        let mut state = lock(&self.state);
        let me = state.ends(side).0;
        me.inbox = Some((inbox, key));
        let mut all = Readiness::READ | Readiness::WRITE;
        if me.fin {
            all = all | Readiness::END;
        }
        if me.error.is_some() {
            all = all | Readiness::ERROR;
        }
        if me.urgent.is_some() {
            all = all | Readiness::URGENT;
        }
        me.report(all);
    }

    pub fn is_pair(&self) -> bool {
        self.pair.is_some()
    }

    /// How this end of a pair is.
    pub fn paired(&self, side: Side) -> Option<Paired> {
        let pair = self.pair.as_ref()?;
        let mut state = lock(&self.state);
        let (me, peer) = state.ends(side);
        let unsent = pair.unread(side.other());
        if peer.closed && !me.over && unsent > 0 {
            // The peer's system would answer with RST.
            me.reset();
        }
        Some(Paired {
            memory: pair.memory(),
            slot: pair.index(),
            end: side.number() as u32,
            ended: me.fin || me.over || me.shut_read,
            in_order: me.fin && !me.shut_read,
            peer_closed: peer.closed,
            bytes_in: pair.sent(side.other()).saturating_sub(pair.unread(side).into()),
            bytes_out: pair.sent(side),
            unread: pair.unread(side),
            unsent,
        })
    }

    /// The other end of a pair may sleep.
    pub fn wake_peer(&self, side: Side, urgent: bool) {
        let mut state = lock(&self.state);
        let (me, peer) = state.ends(side);
        if !peer.closed {
            let urgent = if urgent { Readiness::URGENT } else { Readiness::READ };
            peer.report(Readiness::READ | Readiness::WRITE | urgent);
        } else if !me.over {
            me.reset();
        }
    }

    /// The backlog has room. `false`: the client is gone.
    pub fn establish(&self) -> bool {
        let mut state = lock(&self.state);
        if state.client.closed {
            return false;
        }
        state.established = true;
        state.client.report(Readiness::WRITE);
        true
    }

    /// The listener is gone, and the connection was not established.
    pub fn refuse(&self) {
        let mut state = lock(&self.state);
        state.server.closed = true;
        state.client.over = true;
        state.client.error = Some(Errno(libc::ECONNREFUSED));
        state.client.report(Readiness::WRITE | Readiness::ERROR);
    }

    pub fn is_established(&self) -> bool {
        lock(&self.state).established
    }

    /// True while `getpeername` has an answer.
    pub fn is_connected(&self, side: Side) -> bool {
        let mut state = lock(&self.state);
        state.established && !state.ends(side).0.over
    }

    pub fn client_left(&self) -> bool {
        lock(&self.state).client.closed
    }

    /// The server's end is accepted.
    pub fn accepted(&self, inbox: Arc<Inbox>, key: u64, inline: bool) {
        let mut state = lock(&self.state);
        state.server.inbox = Some((inbox, key));
        state.server.inline = inline;
        state.server.wants_read = true;
    }

    pub fn send(&self, side: Side, data: &Segments, urgent: bool) -> Result<usize, Errno> {
        let mut state = lock(&self.state);
        let (me, peer) = state.ends(side);
        peer.offer = None;
        // More than `data` when this call may send less than the one that made the offer: the next one tells of the rest.
        let mut done = me.taken.min(data.len());
        me.taken -= done;
        if let Some(errno) = me.error.take() {
            return Err(errno);
        }
        if me.over || me.shut {
            return Err(Errno(libc::EPIPE));
        }
        if peer.closed {
            // The peer's system would answer with RST.
            me.reset();
            return Ok(data.len());
        }
        let rest = data.slice(done, data.len() - done);
        if rest.is_empty() {
            return Ok(done);
        }
        if urgent {
            let mut byte = [0];
            rest.slice(rest.len() - 1, 1).copy_to(&mut byte);
            let at = peer.received + (peer.queue.len() + rest.len() - 1) as u64;
            // Offered once already: the receiver may have taken it meanwhile.
            if peer.urgent.as_ref().is_none_or(|known| known.at != at) {
                peer.urgent = Some(Urgent { at, byte: Some(byte[0]), told: false });
            }
            peer.report(Readiness::READ | Readiness::URGENT);
        }
        if rest.len() <= SMALL && peer.queue.len() + rest.len() <= QUEUE {
            peer.append(&rest);
            done = data.len();
        } else {
            peer.offer = Some(Offer(rest));
            me.wants_write = true;
        }
        peer.tell_reader();
        if done == 0 { Err(Errno::AGAIN) } else { Ok(done) }
    }

    pub fn recv(&self, side: Side, into: &Segments) -> Result<Received, Errno> {
        let mut state = lock(&self.state);
        let (me, peer) = state.ends(side);
        if me.urgent.as_ref().is_some_and(|urgent| urgent.at == me.received && !urgent.told) {
            me.wants_read = true;
            return Err(Errno::AGAIN);
        }
        if !me.inline && me.urgent.as_ref().is_some_and(|urgent| urgent.at == me.received) && me.waiting() > 0
        {
            let mut byte = [0];
            me.urgent = None;
            me.skip_byte(peer, &mut byte);
        }
        let limit = match &me.urgent {
            Some(urgent) if urgent.at > me.received => (urgent.at - me.received) as usize,
            _ => usize::MAX,
        };
        let into = into.slice(0, limit.min(into.len()));
        let mut got = me.dequeue(&into);
        if got < into.len()
            && let Some(Offer(offer)) = &me.offer
        {
            let n = into.slice(got, into.len() - got).copy_from_guest(offer);
            let left = offer.slice(n, offer.len() - n);
            me.received += n as u64;
            me.offer = (!left.is_empty()).then_some(Offer(left));
            got += n;
            peer.tell_writer(n);
        }
        if me.urgent.as_ref().is_some_and(|urgent| me.received > urgent.at) {
            me.urgent = None;
        }
        let more = me.waiting() > 0 || me.fin || me.error.is_some();
        if got > 0 {
            me.wants_read = !more;
            return Ok(Received { bytes: got, more });
        }
        // An end in order stays one for who reads, whatever came behind it.
        if !me.fin
            && let Some(errno) = me.error.take()
        {
            return Err(errno);
        }
        me.wants_read = true;
        if me.fin || me.over || me.shut_read {
            return Ok(Received { bytes: 0, more: false });
        }
        Err(Errno::AGAIN)
    }

    pub fn at_mark(&self, side: Side) -> bool {
        let mut state = lock(&self.state);
        let me = state.ends(side).0;
        me.urgent.as_ref().is_some_and(|urgent| urgent.at == me.received)
    }

    pub fn recv_urgent(&self, side: Side) -> Result<u8, Errno> {
        let mut state = lock(&self.state);
        let me = state.ends(side).0;
        if let Some(urgent) = &mut me.urgent {
            urgent.told = true;
        }
        if me.inline {
            return Err(Errno(libc::EINVAL));
        }
        me.urgent.as_mut().and_then(|urgent| urgent.byte.take()).ok_or(Errno(libc::EINVAL))
    }

    pub fn set_inline(&self, side: Side, inline: bool) {
        lock(&self.state).ends(side).0.inline = inline;
    }

    pub fn shutdown(&self, side: Side, how: Shutdown) -> Result<(), Errno> {
        let mut state = lock(&self.state);
        let (me, peer) = state.ends(side);
        if me.over {
            return Err(Errno(libc::ENOTCONN));
        }
        if how != Shutdown::Write {
            me.shut_read = true;
            me.tell_reader();
        }
        if how != Shutdown::Read && !me.shut {
            me.shut = true;
            peer.keep_offer();
            peer.fin = true;
            peer.report(Readiness::READ | Readiness::END);
        }
        Ok(())
    }

    pub fn close(&self, side: Side, how: Close) {
        let mut state = lock(&self.state);
        let (me, peer) = state.ends(side);
        let unread = me.waiting() > 0 || self.pair.as_ref().is_some_and(|pair| pair.unread(side) > 0);
        let over = me.over;
        *me = End { closed: true, over: true, ..End::default() };
        if peer.closed || over {
            peer.offer = None;
            return;
        }
        if how == Close::Abort || unread {
            peer.offer = None;
            peer.reset();
        } else {
            peer.keep_offer();
            peer.fin = true;
            peer.report(Readiness::READ | Readiness::END);
        }
    }

    pub fn take_error(&self, side: Side) -> Result<(), Errno> {
        match lock(&self.state).ends(side).0.error.take() {
            Some(errno) => Err(errno),
            None => Ok(()),
        }
    }

    /// As TCP_INFO names it.
    pub fn tcp_state(&self, side: Side) -> u8 {
        let mut state = lock(&self.state);
        let established = state.established;
        let me = state.ends(side).0;
        match (established, me.over, me.fin, me.shut) {
            (_, true, ..) | (_, _, true, true) => 7,
            (false, ..) => 2,
            (_, _, true, _) => 8,
            (_, _, _, true) => 5,
            _ => 1,
        }
    }

    /// Bytes that this end sent and its peer has not received, but for those in the send ring.
    pub fn unsent(&self, side: Side) -> usize {
        match &self.pair {
            Some(pair) => pair.unread(side.other()) as usize,
            None => lock(&self.state).ends(side).1.queue.len(),
        }
    }

    /// Bytes that wait for this end.
    pub fn waiting(&self, side: Side) -> usize {
        match &self.pair {
            Some(pair) => pair.unread(side) as usize,
            None => lock(&self.state).ends(side).0.waiting(),
        }
    }
}

impl State {
    /// This end and its peer.
    fn ends(&mut self, side: Side) -> (&mut End, &mut End) {
        match side {
            Side::Client => (&mut self.client, &mut self.server),
            Side::Server => (&mut self.server, &mut self.client),
        }
    }
}

impl End {
    fn written(&self) -> LeftEnd {
        LeftEnd {
            queue: to_text(self.queue.iter().copied()),
            taken: self.taken,
            received: self.received,
            urgent: self.urgent.as_ref().map(|urgent| (urgent.at, urgent.byte, urgent.told)),
            inline: self.inline,
            fin: self.fin,
            shut: self.shut,
            shut_read: self.shut_read,
            over: self.over,
            error: self.error.map(|errno| errno.0),
            closed: self.closed,
            wants_read: self.wants_read,
            wants_write: self.wants_write,
        }
    }

    /// What its peer offered is offered again.
    fn of(left: &LeftEnd) -> End {
        End {
            inbox: None,
            queue: from_text(&left.queue),
            offer: None,
            taken: left.taken,
            received: left.received,
            urgent: left.urgent.map(|(at, byte, told)| Urgent { at, byte, told }),
            inline: left.inline,
            fin: left.fin,
            shut: left.shut,
            shut_read: left.shut_read,
            over: left.over,
            error: left.error.map(Errno),
            closed: left.closed,
            wants_read: left.wants_read,
            wants_write: left.wants_write,
        }
    }

    fn report(&self, readiness: Readiness) {
        if let Some((inbox, key)) = &self.inbox {
            inbox.report(*key, readiness);
        }
    }

    fn tell_reader(&mut self) {
        if std::mem::take(&mut self.wants_read) {
            self.report(Readiness::READ);
        }
    }

    /// The peer took `n` bytes of this end's offer.
    fn tell_writer(&mut self, n: usize) {
        self.taken += n;
        if std::mem::take(&mut self.wants_write) {
            self.report(Readiness::WRITE);
        }
    }

    fn waiting(&self) -> usize {
        self.queue.len() + self.offer.as_ref().map_or(0, |offer| offer.0.len())
    }

    /// RST.
    fn reset(&mut self) {
        self.over = true;
        self.error = Some(Errno(if self.fin && !self.shut { libc::EPIPE } else { libc::ECONNRESET }));
        self.report(Readiness::READ | Readiness::WRITE | Readiness::END | Readiness::ERROR);
    }

    fn append(&mut self, data: &Segments) {
        let mut piece = [0; SMALL];
        let mut at = 0;
        while at < data.len() {
            let n = data.slice(at, SMALL).copy_to(&mut piece);
            self.queue.extend(&piece[..n]);
            at += n;
        }
    }

    fn dequeue(&mut self, into: &Segments) -> usize {
        let (first, second) = self.queue.as_slices();
        let mut n = into.copy_from(first);
        if n == first.len() && n < into.len() {
            n += into.slice(n, into.len() - n).copy_from(second);
        }
        self.queue.drain(..n);
        if self.queue.is_empty() && self.queue.capacity() > KEEP {
            self.queue = VecDeque::new();
        }
        self.received += n as u64;
        n
    }

    /// Drops one byte.
    fn skip_byte(&mut self, peer: &mut End, byte: &mut [u8; 1]) {
        self.received += 1;
        if self.queue.pop_front().is_some() {
            return;
        }
        if let Some(Offer(offer)) = &self.offer {
            let n = offer.slice(0, 1).copy_to(byte);
            let left = offer.slice(n, offer.len() - n);
            self.offer = (!left.is_empty()).then_some(Offer(left));
            peer.tell_writer(n);
        }
    }

    /// The sender's ring goes away: what stands there is kept here. A ring is bounded, so that this is.
    fn keep_offer(&mut self) {
        if let Some(Offer(offer)) = self.offer.take() {
            self.append(&offer);
        }
    }
}
