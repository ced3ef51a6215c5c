//! The only unsafe code of the runtime: narrow, safe functions over system calls that rustix and nix do not wrap.
#![allow(unsafe_code)]
