fn main() {
    std::process::exit(netkernel_cli::main());
}
