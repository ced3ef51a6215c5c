//! The `isopod-runtime` binary: OCI verbs and the pod supervisor.

fn main() {
    std::process::exit(isopod_runtime::cli::main())
}
