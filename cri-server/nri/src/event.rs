//! The hooks, and which of them a plugin has subscribed to.

use podvisor_proto::nri::Event;

/// Every event there is: bit N-1 is event N.
const ALL: i32 = (1 << (Event::Last as i32 - 1)) - 1;

/// What a plugin has subscribed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Events(i32);

impl Events {
    /// From a plugin's answer: none at all means every one, an unknown one is refused.
    pub(crate) fn parse(bits: i32) -> Option<Self> {
        match bits {
            0 => Some(Self(ALL)),
            bits if bits & !ALL == 0 => Some(Self(bits)),
            _ => None,
        }
    }

    pub(crate) fn has(self, event: Event) -> bool {
        let number = event as i32;
        number > 0 && number < Event::Last as i32 && self.0 & (1 << (number - 1)) != 0
    }
}

/// The call that tells of an event. `None` where there is none.
pub(crate) fn method(event: Event) -> Option<&'static str> {
    Some(match event {
        Event::RunPodSandbox => "RunPodSandbox",
        Event::UpdatePodSandbox => "UpdatePodSandbox",
        Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
        Event::StopPodSandbox => "StopPodSandbox",
        Event::RemovePodSandbox => "RemovePodSandbox",
        Event::CreateContainer => "CreateContainer",
        Event::PostCreateContainer => "PostCreateContainer",
        Event::StartContainer => "StartContainer",
        Event::PostStartContainer => "PostStartContainer",
        Event::UpdateContainer => "UpdateContainer",
        Event::PostUpdateContainer => "PostUpdateContainer",
        Event::StopContainer => "StopContainer",
        Event::RemoveContainer => "RemoveContainer",
        Event::ValidateContainerAdjustment => "ValidateContainerAdjustment",
        Event::Unknown | Event::Last => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subscription_is_a_set_of_bits() {
        let all = Events::parse(0).unwrap();
        assert!(all.has(Event::RunPodSandbox) && all.has(Event::ValidateContainerAdjustment));
        assert!(!all.has(Event::Unknown) && !all.has(Event::Last));
        let two = Events::parse(0b1001).unwrap();
        assert!(two.has(Event::RunPodSandbox) && two.has(Event::CreateContainer));
        assert!(!two.has(Event::StopPodSandbox));
        assert_eq!(Events::parse(1 << 14), None);
        assert_eq!(Events::parse(-1), None);
    }
}
