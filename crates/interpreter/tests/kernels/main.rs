//! The interpreter with real kernels: IPython, Deno and Bash.
#![allow(clippy::unwrap_used)]

mod contexts;
mod languages;
mod rich;
mod support;
