//! System calls that may block.

/// Runs `work` on a thread that may block and waits for it. The work goes on to its end if the
/// waiting future is dropped.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        // A blocking task that has begun cannot be cancelled, and one that has not is only when the
        // runtime ends, which ends this future first.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
