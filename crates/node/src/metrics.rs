//! What a sandbox uses: the guest's view and the host's, in one.

use cubicle_ids::SandboxId;
use cubicle_protocol::guest_api::Timestamp;

use crate::{error::Result, facts::SandboxMetrics, guest::Guest, sandbox::Live};

/// Asks guest and host at the same time.
pub(crate) async fn measure(id: &SandboxId, live: &Live) -> Result<SandboxMetrics> {
    let guest = Guest {
        id,
        link: &live.link,
    };
    let (inside, outside) = tokio::join!(guest.metrics(), live.vm.usage());
    let (inside, outside) = (inside?, outside?);
    Ok(SandboxMetrics {
        timestamp_ms: Timestamp::now().0 / 1_000_000,
        cpu_count: inside.cpu_count,
        cpu_used_pct: inside.cpu_used_pct,
        mem_total: inside.mem_total,
        mem_used: inside.mem_used,
        mem_cache: inside.mem_cache,
        disk_total: inside.disk_total,
        disk_used: inside.disk_used,
        host_cpu_time_us: outside.cpu_time_us,
        host_private: outside.private_bytes,
        host_resident: outside.resident_bytes,
    })
}
