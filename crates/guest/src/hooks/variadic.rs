//! Exported names of the functions with variable arguments, which are C's (`c/shim.c`).

macro_rules! trampoline {
    ($($name:ident -> $target:ident;)*) => {$(
        #[unsafe(naked)]
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name() {
            core::arch::naked_asm!(concat!("jmp ", stringify!($target)))
        }
    )*};
}

trampoline! {
    execl -> nk_c_execl;
    execlp -> nk_c_execlp;
    execle -> nk_c_execle;
    dprintf -> nk_c_dprintf;
    vdprintf -> nk_c_vdprintf;
    __dprintf_chk -> nk_c_dprintf_chk;
    __vdprintf_chk -> nk_c_vdprintf_chk;
}
