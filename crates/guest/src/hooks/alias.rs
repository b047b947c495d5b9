//! The second names that glibc exports for some calls. They are this library's own functions.

macro_rules! alias {
    ($($name:ident is $target:ident;)*) => {$(
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name() {
            core::arch::naked_asm!(concat!("jmp ", stringify!($target), "@PLT"))
        }
    )*};
}

alias! {
    __close is close;
    __connect is connect;
    __dup2 is dup2;
    __fcntl is fcntl;
    __poll is poll;
    __read is read;
    __select is select;
    __send is send;
    __vfork is vfork;
    __write is write;
}
