//! Work that would hold up the connections of the thread it runs on, and tasks that are large.

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task::JoinHandle,
};

/// Starts a task that holds much, as one that serves a connection or a request does: what it holds stays where it was made. The runtime
/// moves what it is given several times before a task begins, and writes over all of its place when it ends.
#[inline]
pub fn large(future: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(Box::pin(future))
}

/// Does something that takes long, while another thread takes over what else this one has to do. Where there is no other thread it
/// is just done.
pub fn aside<T>(work: impl FnOnce() -> T) -> T {
    let many = Handle::try_current().is_ok_and(|handle| handle.runtime_flavor() == RuntimeFlavor::MultiThread);
    if many { tokio::task::block_in_place(work) } else { work() }
}
