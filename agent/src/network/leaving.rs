//! Links that go at the same time go together.
//!
//! For every link that the kernel deletes it waits until nobody can be using it any more, some 25 ms, and everybody else
//! who asks it about links waits as long. For many at once it waits once: five hundred pods' links go in one second
//! instead of twelve.

use parking_lot::Mutex;
use rtnetlink::Handle;
use tokio::sync::oneshot;

use super::links;

/// Links on their way out.
#[derive(Default)]
pub(super) struct Leaving {
    waiting: Mutex<Vec<(String, oneshot::Sender<()>)>>,
    /// Whoever has it takes along what has come together meanwhile.
    turn: tokio::sync::Mutex<()>,
}

impl Leaving {
    /// Deletes a link; one that is not there is no error.
    pub(super) async fn delete(&self, handle: &Handle, link: &str) -> Result<(), links::Error> {
        let (done, gone) = oneshot::channel();
        self.waiting.lock().push((link.to_owned(), done));
        let turn = self.turn.lock().await;
        let (names, all): (Vec<_>, Vec<_>) = std::mem::take(&mut *self.waiting.lock()).into_iter().unzip();
        match &names[..] {
            [] => {}
            [only] if only == link => return links::delete(handle, link).await,
            _ => match links::delete_all(handle, &names).await {
                Ok(()) => all.into_iter().for_each(|done| _ = done.send(())),
                Err(error) => tracing::debug!(%error, links = names.len(), "each for itself"),
            },
        }
        drop(turn);
        match gone.await {
            Ok(()) => Ok(()),
            // They could not go together, or whoever had the turn was cancelled.
            Err(_) => links::delete(handle, link).await,
        }
    }
}
