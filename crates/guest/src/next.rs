//! The symbols behind ours: libc's, or those of another preloaded library.
//!
//! They are looked up once, in the constructor: some programs call socket functions from inside malloc before that, where
//! a lookup would deadlock (redis's jemalloc). Before the constructor ran, a raw system call answers where there is one.

use core::ffi::c_char;
use core::sync::atomic::{AtomicUsize, Ordering};

/// One looked-up symbol.
pub struct Symbol {
    name: &'static [u8],
    address: AtomicUsize,
}

impl Symbol {
    pub const fn new(name: &'static [u8]) -> Symbol {
        Symbol { name, address: AtomicUsize::new(0) }
    }

    /// Address of the next definition, 0 when there is none.
    pub fn address(&self) -> usize {
        let address = self.address.load(Ordering::Relaxed);
        if address != 0 { address } else { self.look_up() }
    }

    #[cold]
    fn look_up(&self) -> usize {
        // SAFETY: name is a C string (the macro appends the NUL).
        let address = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr() as *const c_char) } as usize;
        self.address.store(address, Ordering::Relaxed);
        address
    }
}

/// Calls the next definition of `$name`; aborts the call with ENOSYS where libc has none.
macro_rules! next {
    ($name:ident ( $($arg:expr => $ty:ty),* $(,)? ) -> $ret:ty) => {{
        static SYMBOL: $crate::next::Symbol = $crate::next::Symbol::new(concat!(stringify!($name), "\0").as_bytes());
        let address = SYMBOL.address();
        if address == 0 {
            $crate::sys::set_errno(libc::ENOSYS);
            -1i32 as $ret
        } else {
            // SAFETY: the symbol of this name has this signature in libc; arguments are the caller's own.
            #[allow(unused_unsafe)]
            unsafe {
                let f: extern "C" fn($($ty),*) -> $ret = core::mem::transmute::<usize, extern "C" fn($($ty),*) -> $ret>(address);
                f($($arg),*)
            }
        }
    }};
}
pub(crate) use next;
