//! Work that would hold up the connections of the thread it runs on.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Does something that takes long, while another thread takes over what else this one has to do. Where there is no other thread it
/// is just done.
pub fn aside<T>(work: impl FnOnce() -> T) -> T {
    let many = Handle::try_current().is_ok_and(|handle| handle.runtime_flavor() == RuntimeFlavor::MultiThread);
    if many { tokio::task::block_in_place(work) } else { work() }
}
