#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    netkernel_fuzz::journal(data);
});
