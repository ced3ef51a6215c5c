//! Has the linker put the functions that an idle node runs next to each other, in the order of `order.txt` (`make order`).

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=order.txt");
    if env::var("PROFILE").as_deref() == Ok("release") {
        let order = format!("{}/order.txt", env::var("CARGO_MANIFEST_DIR").unwrap_or_default());
        println!("cargo::rustc-link-arg-bins=-Wl,--symbol-ordering-file={order},--no-warn-symbol-ordering");
    }
}
