use serde::Serialize;
use tokio::sync::mpsc;

/// A stage of longer work, by a stable name such as `bootstrap`.
///
/// The steps of this crate are constants here. Work that contains an image build, such as that of
/// a template, reports steps of its own through the same [`Progress`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Step(&'static str);

impl Step {
    /// Waiting for the same artefact to be finished by somebody else.
    pub const WAIT: Step = Step("wait");
    /// Finding and downloading the kernel package.
    pub const KERNEL_DOWNLOAD: Step = Step("kernel-download");
    /// Unpacking the kernel and its modules.
    pub const KERNEL_UNPACK: Step = Step("kernel-unpack");
    /// Writing the initramfs.
    pub const INITRAMFS: Step = Step("initramfs");
    /// Downloading and installing the packages of a root file system.
    pub const BOOTSTRAP: Step = Step("bootstrap");
    /// Doing what a recipe does beyond its packages.
    pub const SETUP: Step = Step("setup");
    /// Packing a directory tree into a disk image.
    pub const DISK_IMAGE: Step = Step("disk-image");

    /// A step with the given name: lower-case words joined by `-`.
    pub const fn new(name: &'static str) -> Step {
        Step(name)
    }

    /// The name.
    pub const fn name(self) -> &'static str {
        self.0
    }
}

/// Something that happened in longer work.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Event {
    /// The stage that the work is in.
    pub step: Step,
    /// What happened, for a person to read; one line.
    pub message: String,
    /// How much of the step is done, from 0 to 1, where that is known. A step that has ended
    /// has sent 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f32>,
}

/// Where longer work reports how it goes. Cheap to clone; reporting never blocks and never fails,
/// also when nobody listens.
#[derive(Debug, Clone, Default)]
pub struct Progress(Option<mpsc::UnboundedSender<Event>>);

impl Progress {
    /// Reports that nobody reads.
    pub fn silent() -> Progress {
        Progress(None)
    }

    /// Reports that arrive at the returned receiver. It ends when all clones are dropped.
    pub fn channel() -> (Progress, mpsc::UnboundedReceiver<Event>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Progress(Some(sender)), receiver)
    }

    /// Says that a step goes on, at an unknown fraction.
    pub fn message(&self, step: Step, message: impl Into<String>) {
        self.send(Event {
            step,
            message: message.into(),
            fraction: None,
        });
    }

    /// Says how much of a step is done, from 0 to 1.
    pub fn fraction(&self, step: Step, message: impl Into<String>, fraction: f32) {
        self.send(Event {
            step,
            message: message.into(),
            fraction: Some(fraction.clamp(0.0, 1.0)),
        });
    }

    /// Says that a step has ended well.
    pub fn done(&self, step: Step, message: impl Into<String>) {
        self.fraction(step, message, 1.0);
    }

    fn send(&self, event: Event) {
        if let Some(sender) = &self.0 {
            // A receiver that went away has lost its interest; the work goes on.
            sender.send(event).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_arrive_in_order_and_end_with_the_last_sender() {
        let (progress, mut events) = Progress::channel();
        progress.message(Step::BOOTSTRAP, "resolving");
        progress.fraction(Step::BOOTSTRAP, "installing", 1.5);
        drop(progress);
        assert_eq!(events.recv().await.unwrap().fraction, None);
        assert_eq!(
            events.recv().await.unwrap().fraction,
            Some(1.0),
            "fractions are clamped"
        );
        assert_eq!(events.recv().await, None);
    }

    #[test]
    fn an_event_is_a_flat_json_object() {
        let event = Event {
            step: Step::INITRAMFS,
            message: "done".into(),
            fraction: None,
        };
        assert_eq!(
            serde_json::to_value(&event).unwrap(),
            serde_json::json!({"step": "initramfs", "message": "done"})
        );
    }
}
