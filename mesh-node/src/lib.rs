//! The library of mesh-node. Modules by layer: each may import its own layer and those with lower numbers; `cargo xtask layers`
//! checks it against the table in ARCHITECTURE.md.

// 1 foundation
pub mod id;
pub mod io;
pub mod problems;
pub mod spawn;
pub mod telemetry;
// 2 pure decisions
pub mod balance;
pub mod detect;
pub mod jwt;
pub mod policy;
pub mod report;
pub mod resource;
pub mod route;
// 3 configuration
pub mod config;
pub mod grpc;
pub mod tls;
// 4 services
pub mod capture;
pub mod hbone;
pub mod identity;
pub mod jwks;
// 5 data path, sources
pub mod proxy;
pub mod sources;
// 6 composition
pub mod admin;
pub mod app;
pub mod cli;
