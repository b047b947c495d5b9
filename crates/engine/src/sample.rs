//! Takes the times of one turn of a guest in many.

use netkernel_service::{Stages, Timer, now_ns};

/// One turn; nothing, in most of them.
pub(crate) struct Sample<'a> {
    stages: Option<&'a mut Stages>,
    begun_ns: u64,
    stack_ns: u64,
}

impl<'a> Sample<'a> {
    #[inline]
    pub fn begin(taken: bool, stages: &'a mut Stages) -> Sample<'a> {
        let begun_ns = if taken { now_ns() } else { 0 };
        Sample { stages: taken.then_some(stages), begun_ns, stack_ns: 0 }
    }

    /// For the stack's calls of this turn.
    #[inline]
    pub fn timer(&mut self) -> Option<Timer<'_>> {
        let stages = self.stages.as_mut()?;
        Some(Timer { histogram: &mut stages.stack, spent_ns: &mut self.stack_ns, begun_ns: 0 })
    }

    /// What was not the stack's time is ServiceLib's, for so many elements.
    #[inline]
    pub fn end(self, elements: usize) {
        if let Some(stages) = self.stages
            && elements > 0
        {
            let own = now_ns().saturating_sub(self.begun_ns).saturating_sub(self.stack_ns);
            stages.service.record(own / elements as u64);
        }
    }
}
