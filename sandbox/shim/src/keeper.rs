//! The thread that has the pod's machine: boots it, adds disks to it, notices its end, ends it.
//!
//! It is the main thread, because the kernel ends a machine with the thread that started it. All
//! others ask it, one after the other.

use std::{
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    io::Errno,
};

use crate::{
    directory::Directory,
    disks::Backing,
    error::{ShimError, during},
    machine::{Booted, Ended, Plan, Running},
    stamps::Stamps,
};

enum Order {
    Boot(Box<Plan>, Sender<Result<Booted, ShimError>>),
    AddDisk(Backing, Sender<Result<(), ShimError>>),
    RemoveDisk {
        id: String,
        must: bool,
        tell: Sender<bool>,
    },
    End(Sender<()>),
    Leave,
}

/// The way to the keeper.
#[derive(Debug)]
pub(crate) struct Orders {
    queue: Mutex<Sender<Order>>,
    bell: Arc<OwnedFd>,
    /// Where containerd finds us.
    socket: PathBuf,
}

impl Orders {
    fn give(&self, order: Order) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        // It takes orders as long as the process is there.
        let _ = queue.send(order);
        let _ = rustix::io::write(&*self.bell, &1u64.to_ne_bytes());
    }

    /// Has a machine booted, unless there is one.
    pub(crate) fn boot(&self, plan: Plan) -> Result<Booted, ShimError> {
        let (tell, told) = channel();
        self.give(Order::Boot(Box::new(plan), tell));
        told.recv()
            .map_err(|_| ShimError::State("the shim is leaving".into()))?
    }

    /// Has a disk served and added to the machine.
    pub(crate) fn add_disk(&self, backing: Backing) -> Result<(), ShimError> {
        let (tell, told) = channel();
        self.give(Order::AddDisk(backing, tell));
        told.recv()
            .map_err(|_| ShimError::State("the shim is leaving".into()))?
    }

    /// Has a disk taken from the machine. True once that is done, as `Disks::remove` has it.
    pub(crate) fn remove_disk(&self, id: &str, must: bool) -> bool {
        let (tell, told) = channel();
        self.give(Order::RemoveDisk {
            id: id.to_owned(),
            must,
            tell,
        });
        // A keeper that has gone has taken the machine along.
        told.recv().unwrap_or(true)
    }

    /// Has the machine ended in good order, if there is one, and its directory removed.
    pub(crate) fn end(&self) {
        let (tell, told) = channel();
        self.give(Order::End(tell));
        let _ = told.recv();
    }

    /// Has the shim leave. Nobody finds it from now on: a container of the same name gets another.
    pub(crate) fn leave(&self) {
        let _ = std::fs::remove_file(&self.socket);
        self.give(Order::Leave);
    }
}

pub(crate) struct Keeper {
    orders: Receiver<Order>,
    bell: Arc<OwnedFd>,
    directory: Directory,
    stamps: Arc<Stamps>,
    /// It is ours; once removed it may be a successor's.
    made: bool,
    running: Option<Running>,
}

impl Keeper {
    pub(crate) fn new(
        directory: Directory,
        socket: PathBuf,
        stamps: Arc<Stamps>,
    ) -> Result<(Self, Orders), ShimError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell = Arc::new(eventfd(0, flags).map_err(during("a descriptor"))?);
        let (queue, orders) = channel();
        let keeper = Self {
            orders,
            bell: Arc::clone(&bell),
            directory,
            stamps,
            made: false,
            running: None,
        };
        let queue = Mutex::new(queue);
        let orders = Orders {
            queue,
            bell,
            socket,
        };
        Ok((keeper, orders))
    }

    /// Keeps the machine until it is told to leave; `lost` is told why a machine has ended that
    /// nobody has ended.
    pub(crate) fn run(mut self, lost: impl Fn(Ended)) {
        loop {
            if self.wait()
                && let Some(ended) = self.running.as_mut().and_then(Running::ended)
            {
                if let Some(running) = self.running.take() {
                    running.end(false);
                }
                lost(ended);
            }
            let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
            while let Ok(order) = self.orders.try_recv() {
                match order {
                    Order::Boot(plan, tell) => {
                        let _ = tell.send(self.boot(&plan));
                    }
                    Order::AddDisk(backing, tell) => {
                        let _ = tell.send(match &mut self.running {
                            Some(running) => running.add_disk(backing),
                            None => Err(ShimError::State("the pod has no machine".into())),
                        });
                    }
                    Order::RemoveDisk { id, must, tell } => {
                        let running = self.running.as_mut();
                        // Its disks have ended with a machine.
                        let _ = tell.send(running.is_none_or(|it| it.remove_disk(&id, must)));
                    }
                    Order::End(tell) => {
                        self.end();
                        let _ = tell.send(());
                    }
                    Order::Leave => {
                        self.end();
                        return;
                    }
                }
            }
        }
    }

    /// Waits for an order or an end. Whether it may be an end.
    fn wait(&self) -> bool {
        let exits = self.running.as_ref().map(Running::exit_fds);
        let mut fds = vec![PollFd::new(&*self.bell, PollFlags::IN)];
        let exits = exits.into_iter().flatten();
        fds.extend(exits.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => log::error!("waiting for the machine: {error}"),
        }
        fds[1..].iter().any(|fd| !fd.revents().is_empty())
    }

    fn boot(&mut self, plan: &Plan) -> Result<Booted, ShimError> {
        if self.running.is_some() {
            return Err(ShimError::Exists("the pod has a machine".into()));
        }
        self.directory.create()?;
        self.made = true;
        match Running::boot(plan, &self.directory, &self.stamps) {
            Ok(running) => {
                let booted = running.booted();
                self.running = Some(running);
                Ok(booted)
            }
            Err(error) => {
                self.clean();
                Err(error)
            }
        }
    }

    fn end(&mut self) {
        if let Some(running) = self.running.take() {
            running.end(true);
        }
        self.clean();
    }

    fn clean(&mut self) {
        if !std::mem::take(&mut self.made) {
            return;
        }
        if let Err(error) = self.directory.remove() {
            log::warn!("the pod's directory cannot be removed: {error}");
        }
    }
}
