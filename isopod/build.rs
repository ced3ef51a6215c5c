//! How the executable is linked.

fn main() {
    // A tenth of the code is other code once more: generic functions and destructors of other types. What is the same is kept
    // once: an idle node has less of the file in memory. Only functions are merged, and nothing compares their addresses.
    println!("cargo:rustc-link-arg-bins=-Wl,--icf=all");
    println!("cargo:rerun-if-changed=build.rs");
}
