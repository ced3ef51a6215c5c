//! Moving bytes: container output to logs and clients, clients' input to containers.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll;

use super::{
    container::{self, Container, Read},
    log::Stream,
    server::{READ_BUFFER, Server, Source},
};

impl Server {
    fn scratch(&mut self) -> (Vec<u8>, Vec<u8>) {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(READ_BUFFER, 0);
        (buffer, std::mem::take(&mut self.batch))
    }

    pub(super) fn output(&mut self, id: &str, stream: Stream) {
        let (mut buffer, mut batch) = self.scratch();
        let mut ended = false;
        if let Some(container) = self.containers.get_mut(id) {
            let read =
                container.output[stream as usize].as_ref().map(|(fd, _)| container::read(fd.as_fd(), &mut buffer));
            match read {
                Some(Read::Data(n)) => container.output(stream, &buffer[..n], &mut batch),
                Some(Read::End) => ended = true,
                Some(Read::Empty) | None => {}
            }
            if ended && let Some((fd, token)) = container.output[stream as usize].take() {
                self.unwatch(fd.as_fd(), token);
            }
        }
        (self.buffer, self.batch) = (buffer, batch);
    }

    pub(super) fn terminal(&mut self, id: &str, flags: epoll::EventFlags) {
        if flags.contains(epoll::EventFlags::OUT) {
            self.feed(id);
        }
        let (mut buffer, mut batch) = self.scratch();
        let mut ended = false;
        if let Some(container) = self.containers.get_mut(id) {
            let read = container.master.as_ref().map(|(fd, _)| container::read(fd.as_fd(), &mut buffer));
            match read {
                Some(Read::Data(n)) => container.output(Stream::Stdout, &buffer[..n], &mut batch),
                // A hang-up stays ready for ever; the master itself is kept for resizes until the container ends.
                Some(Read::End) => ended = true,
                Some(Read::Empty) | None => {}
            }
            if ended && let Some((fd, token)) = &container.master {
                self.sources.remove(token);
                let _ = epoll::delete(&self.epoll, fd);
            }
        }
        (self.buffer, self.batch) = (buffer, batch);
    }

    /// Reads all there is: after the last writer's end nothing may be lost.
    pub(super) fn drain(&mut self, id: &str) {
        let (mut buffer, mut batch) = self.scratch();
        if let Some(container) = self.containers.get_mut(id) {
            for stream in [Stream::Stdout, Stream::Stderr] {
                while let Some((fd, _)) = &container.output[stream as usize] {
                    let Read::Data(n) = container::read(fd.as_fd(), &mut buffer) else { break };
                    container.output(stream, &buffer[..n], &mut batch);
                }
            }
            while let Some((fd, _)) = &container.master {
                let Read::Data(n) = container::read(fd.as_fd(), &mut buffer) else { break };
                container.output(Stream::Stdout, &buffer[..n], &mut batch);
            }
        }
        (self.buffer, self.batch) = (buffer, batch);
    }

    pub(super) fn close_streams(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        if let Some(log) = &mut container.log {
            log.finish(&mut self.batch);
            if log.lost() > 0 {
                eprintln!("container {id}: {} bytes of output found no room", log.lost());
            }
        }
        (container.log, container.held) = (None, None);
        let mut closing: Vec<(OwnedFd, u64)> = container.output.iter_mut().filter_map(Option::take).collect();
        closing.extend(container.master.take());
        if let Some((fd, Some(token))) = container.stdin.take() {
            closing.push((fd, token));
        }
        closing.extend(container.attached.drain(..).filter_map(|a| a.stdin));
        for (fd, token) in closing {
            self.unwatch(fd.as_fd(), token);
        }
        if !self.containers.values().any(Container::is_alive) {
            (self.buffer, self.batch) = (vec![], vec![]);
        }
    }

    /// Takes input of an attached client, no more than the container has room for.
    pub(super) fn client_stdin(&mut self, id: &str, token: u64) {
        let mut buffer = [0u8; 4096];
        let Some(container) = self.containers.get_mut(id) else { return };
        let found = container.attached.iter_mut().find(|a| a.stdin.as_ref().is_some_and(|s| s.1 == token));
        let Some(client) = found else { return };
        let Some((fd, _)) = &client.stdin else { return };
        match container::read(fd.as_fd(), &mut buffer) {
            Read::Data(n) => client.pending.extend_from_slice(&buffer[..n]),
            Read::Empty => return,
            Read::End => {
                if let Some((fd, token)) = client.stdin.take() {
                    self.unwatch(fd.as_fd(), token);
                }
            }
        }
        self.feed(id);
    }

    /// Moves pending input on and watches whichever side has to move next.
    pub(super) fn feed(&mut self, id: &str) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let full = container.feed();
        let close_stdin = container.forget_clients();
        for client in &container.attached {
            if let Some((fd, token)) = &client.stdin {
                let wanted = if client.pending.is_empty() { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
                let _ = epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(*token), wanted);
            }
        }
        if let Some((fd, token)) = &container.master {
            let out = if full { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
            let _ = epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(*token), epoll::EventFlags::IN | out);
            return;
        }
        let Some((fd, token)) = container.stdin.take() else { return };
        if let Some(token) = token.filter(|_| !full || close_stdin) {
            self.unwatch(fd.as_fd(), token);
            if !close_stdin {
                self.keep_stdin(id, fd, None);
            }
            return;
        }
        if close_stdin {
            return;
        }
        let token = match token {
            None if full => {
                self.watch(fd.as_fd(), Source::Stdin { container: id.to_owned() }, epoll::EventFlags::OUT).ok()
            }
            other => other,
        };
        self.keep_stdin(id, fd, token);
    }

    fn keep_stdin(&mut self, id: &str, fd: OwnedFd, token: Option<u64>) {
        if let Some(container) = self.containers.get_mut(id) {
            container.stdin = Some((fd, token));
        }
    }
}
