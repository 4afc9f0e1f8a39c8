//! The arbiter that is etcd: one key for each epoch, made by a transaction that compares and puts.
//!
//! The transaction succeeds only where the epoch's key does not exist and the key of the epoch before
//! is the one that the claim builds on. Reads are linearizable. A transaction without an answer may
//! have happened: the answer is then that it is not known, and the same claim, made again, finds its
//! own record.

use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, SortOrder, SortTarget, Txn,
    TxnOp, TxnOpResponse,
};
use format::Epoch;
use ft::directory::record_name;
use ft::{ArbiterReply, ArbiterRequest, Base, CallId, EpochRecord};
use tokio::runtime::{Builder, Runtime};

use crate::Arbiter;

/// How to reach etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// `host:port` of the members.
    pub endpoints: Vec<String>,
    /// Key prefix of this VM, for example `/pollux/web1/`: one VM's alone.
    pub prefix: String,
    /// User name and password, where etcd asks for them.
    pub user: Option<(String, String)>,
    /// How long one request may take.
    pub timeout: Duration,
}

/// Asks etcd.
pub struct EtcdArbiter {
    config: EtcdConfig,
    runtime: Runtime,
    client: Option<Client>,
}

impl std::fmt::Debug for EtcdArbiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdArbiter")
            .field("endpoints", &self.config.endpoints)
            .field("prefix", &self.config.prefix)
            .finish_non_exhaustive()
    }
}

impl EtcdArbiter {
    /// Connects when it is first asked, and again after any error.
    ///
    /// # Errors
    /// The runtime cannot be made.
    pub fn new(config: EtcdConfig) -> std::io::Result<Self> {
        Ok(Self {
            config,
            runtime: Builder::new_current_thread().enable_all().build()?,
            client: None,
        })
    }
}

impl Arbiter for EtcdArbiter {
    fn answer(&mut self, _: CallId, request: ArbiterRequest) -> ArbiterReply {
        let (config, known) = (&self.config, self.client.take());
        let result = self.runtime.block_on(async {
            let mut client = match known {
                Some(client) => client,
                None => connect(config).await?,
            };
            let work = async {
                match request {
                    ArbiterRequest::Newest => newest(&mut client, config).await,
                    ArbiterRequest::TryWin { base, record } => {
                        try_win(&mut client, config, base, &record).await
                    }
                }
            };
            let reply = tokio::time::timeout(config.timeout, work).await;
            match reply {
                Ok(Ok(reply)) => Ok((client, reply)),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("no answer in time".to_owned()),
            }
        });
        match result {
            Ok((client, reply)) => {
                self.client = Some(client);
                reply
            }
            Err(why) => ArbiterReply::Unreachable(format!("etcd: {why}")),
        }
    }
}

async fn connect(config: &EtcdConfig) -> Result<Client, String> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(config.timeout)
        .with_timeout(config.timeout);
    if let Some((name, password)) = &config.user {
        options = options.with_user(name, password);
    }
    Client::connect(&config.endpoints, Some(options))
        .await
        .map_err(|error| error.to_string())
}

fn key(config: &EtcdConfig, epoch: Epoch) -> String {
    format!("{}{}", config.prefix, record_name(epoch))
}

async fn newest(client: &mut Client, config: &EtcdConfig) -> Result<ArbiterReply, Error> {
    let options = GetOptions::new()
        .with_prefix()
        .with_sort(SortTarget::Key, SortOrder::Descend)
        .with_limit(1);
    let prefix = format!("{}epoch-", config.prefix);
    let answer = client.get(prefix, Some(options)).await?;
    Ok(match answer.kvs().first() {
        None => ArbiterReply::Newest(None),
        Some(found) => decode(found.value(), |record| ArbiterReply::Newest(Some(record))),
    })
}

async fn try_win(
    client: &mut Client,
    config: &EtcdConfig,
    base: Option<Base>,
    record: &EpochRecord,
) -> Result<ArbiterReply, Error> {
    let mine = key(config, record.epoch);
    let mut conditions = vec![Compare::create_revision(mine.clone(), CompareOp::Equal, 0)];
    if let Some(base) = base {
        let before = key(config, base.epoch);
        let answer = client.get(before.clone(), None).await?;
        let found = answer.kvs().first();
        let nonce = found.and_then(|kv| EpochRecord::decode(kv.value()).ok());
        match (found, nonce) {
            (Some(kv), Some(record)) if record.nonce == base.nonce => {
                let unchanged = Compare::mod_revision(before, CompareOp::Equal, kv.mod_revision());
                conditions.push(unchanged);
            }
            _ => {
                let why = "etcd: the record before this one is not there: another prefix?";
                return Ok(ArbiterReply::Unreachable(why.to_owned()));
            }
        }
    }
    let claim = Txn::new()
        .when(conditions)
        .and_then([TxnOp::put(mine.clone(), record.encode(), None)])
        .or_else([TxnOp::get(mine, None)]);
    let answer = client.txn(claim).await?;
    if answer.succeeded() {
        return Ok(ArbiterReply::Won);
    }
    let found = answer.op_responses().into_iter().find_map(|op| match op {
        TxnOpResponse::Get(got) => got.kvs().first().map(|kv| kv.value().to_vec()),
        _ => None,
    });
    Ok(match found {
        None => ArbiterReply::Unreachable("etcd: the record before changed".to_owned()),
        Some(bytes) => decode(&bytes, |found| {
            if found.nonce == record.nonce {
                ArbiterReply::Won
            } else {
                ArbiterReply::Taken(found)
            }
        }),
    })
}

fn decode(bytes: &[u8], reply: impl FnOnce(EpochRecord) -> ArbiterReply) -> ArbiterReply {
    match EpochRecord::decode(bytes) {
        Ok(record) => reply(record),
        Err(error) => ArbiterReply::Unreachable(format!("etcd: record: {error}")),
    }
}
