//! The control plane over no machines at all, to try clients against: everything about sandboxes
//! works but what is inside them.
//!
//!     cargo run -p cubicle-api --example control_only -- 127.0.0.1:3999

use std::sync::Arc;

use cubicle_api::{ApiConfig, AppState};
use cubicle_control::{
    Control, ControlConfig,
    fleet::memory::MemoryFleet,
    template::{BuildSpec, BuildTemplate, Size},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:3999".to_owned());
    let dir = tempfile::tempdir()?;
    let config = ControlConfig::new(dir.path().join("cubicle.db"));
    let (control, _) = Control::open(config, Arc::new(MemoryFleet::default())).await?;
    let order = BuildTemplate {
        name: "base".to_owned(),
        tags: Vec::new(),
        size: Size {
            cpu_count: 2,
            memory_mib: 512,
            disk_mib: 4096,
        },
        spec: BuildSpec {
            force: false,
            ..BuildSpec::recipe("base")
        },
        request_id: None,
    };
    control.templates.build(order).await?;
    if let Some(made) = control.keys.ensure_default().await? {
        println!("export E2B_API_KEY={}", made.key);
    }
    println!("export E2B_API_URL=http://{address}");
    let config = ApiConfig {
        open_metrics: true,
        ..ApiConfig::default()
    };
    let router = cubicle_api::router(AppState::new(control, config, |_| ()));
    let listener = tokio::net::TcpListener::bind(&address).await?;
    axum::serve(listener, router).await?;
    Ok(())
}
